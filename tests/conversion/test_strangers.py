"""Folders and checkpoints from a stranger run no code, whichever pickle asks for it, and are refused by its name."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rmoe_megablocks.conversion import source as sources
from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.importing import import_folder
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import compatibility
from rmoe_megablocks.torch_dist.unpickling import read_index
from tests.checkpoints import stored
from tests.conversion import made as models
from tests.conversion.cells import CELLS, GRU, UNTIED

NAME = f"iter_{models.ITERATION:07d}"


class Evil:
    """What it is unpickled by makes ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made(*UNTIED, *GRU), tmp_path / "checkpoints")


def poison_index(checkpoint: Path, evil: Evil) -> None:
    index = read_index(checkpoint)
    index.planner_data = evil
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def poison_object(key: str):
    """Appends what it makes to the file of ``key``, where the index then finds it."""

    def poison(checkpoint: Path, evil: Evil) -> None:
        path, _, _ = stored(checkpoint, key)
        content = io.BytesIO()
        torch.save([evil], content)
        index = read_index(checkpoint)
        for place, info in index.storage_data.items():
            if place.fqn.startswith(key):
                info.offset, info.length = path.stat().st_size, len(content.getvalue())
                break
        with path.open("ab") as file:
            file.write(content.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index))

    return poison


POISONS = {
    "index": poison_index,
    "common state": poison_object("common_state"),
    "extra state": poison_object("decoder.layers.self_attention.linear_proj._extra_state/shard_0_3"),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint(copy, tmp_path, poison, sealed):
    """The launcher's own checks, which come before Megatron unpickles all of it, and the export."""
    POISONS[poison](copy / NAME, Evil(tmp_path / "was run"))
    (copy / NAME / "integrity.json").unlink()
    if sealed:
        models.seal(copy / NAME)
    with pytest.raises(UsageError, match=r"asks for (posix|os)\.mkdir"):
        compatibility.saved_state(copy)
    if poison != "extra state":  # which an export never reads
        with pytest.raises(UsageError, match=r"asks for (posix|os)\.mkdir"):
            sources.open_source(copy, None, None)
    assert not (tmp_path / "was run").exists()


def test_the_poison_works(copy, tmp_path):
    """Without the allow-list it would have been run."""
    poison_index(copy / NAME, Evil(tmp_path / "was run"))
    pickle.loads((copy / NAME / ".metadata").read_bytes())
    assert (tmp_path / "was run").exists()


def test_a_file_outside_of_the_checkpoint(copy):
    index = read_index(copy / NAME)
    next(iter(index.storage_data.values())).relative_path = "../../../etc/passwd"
    (copy / NAME / ".metadata").write_bytes(pickle.dumps(index))
    models.seal(copy / NAME)
    with pytest.raises(UsageError, match="outside of its folder"):
        sources.open_source(copy, None, None)


def test_a_bin_file(made, tmp_path):
    export(made(*CELLS["stacked, untied, gru"]), tmp_path / "folder", Options(verify=False, tokenizer="none"))
    for path in (*(tmp_path / "folder").glob("*.safetensors"), tmp_path / "folder" / "SHA256SUMS"):
        path.unlink()
    torch.save({"model.norm.weight": Evil(tmp_path / "was run")}, tmp_path / "folder" / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin holds something else than tensors, which is not run"):
        import_folder(tmp_path / "folder", tmp_path / "checkpoints")
    assert not (tmp_path / "was run").exists() and not (tmp_path / "checkpoints").exists()


def test_a_router_type_is_not_imported(made, tmp_path, monkeypatch):
    export(made(*CELLS["stacked, untied, gru"]), tmp_path / "folder", Options(verify=False, tokenizer="none"))
    (tmp_path / "strangers.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'was run')!r})\n")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "folder" / "config.json"
    config.write_text(config.read_text().replace('"gru"', '"strangers:Router"'))
    with pytest.raises(UsageError, match="--trust-router-code"):
        import_folder(tmp_path / "folder", tmp_path / "checkpoints")
    assert not (tmp_path / "was run").exists()
