"""Reading torch_dist checkpoints without a process group, to compare what two runs have saved."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the latest checkpoint in ``folder``: weights and optimizer state."""
    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
    state: dict = {}
    reader = FileSystemReader(folder / f"iter_{iteration:07d}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in _flat(state) if torch.is_tensor(value)}


def _flat(value, name: str = ""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def assert_same_tensors(left: Path, right: Path) -> None:
    """Bit for bit."""
    ours, theirs = load_tensors(left), load_tensors(right)
    assert ours and ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, as {different[0]}"
