"""Reading torch_dist checkpoints without a process group, to compare what two runs have saved, and damaging them."""

import pickle
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


def stored(checkpoint: Path, key: str) -> tuple[Path, int, int]:
    """File, offset and length of what one checkpoint holds under ``key``."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn.startswith(key)]
    return checkpoint / info.relative_path, info.offset, info.length


def flip(path: Path, position: int) -> None:
    """Damages one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def flip_in_a_weight(checkpoint: Path) -> Path:
    """Damages a byte in the middle of a tensor, where nothing but a checksum can notice. Returns the file."""
    path, offset, length = stored(checkpoint, "output_layer.weight")
    flip(path, offset + length // 2)
    return path
