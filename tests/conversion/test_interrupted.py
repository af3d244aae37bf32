"""An export that is killed in the middle goes on where it was, and ends in what an undisturbed one writes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.folder import shards
from tests.conversion.cells import GRU, UNTIED

OPTIONS = Options(verify=False, tokenizer="none", max_shard_size=30_000)
# kill -9 when the third file is written and not yet in its place, or when the fourth is half written
KILLED = """
import os, signal, sys
from pathlib import Path
import rmoe_megablocks.megatron
from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.folder import shards

original, calls = shards.save_file, []

def save_file(tensors, path, **more):
    calls.append(path)
    original(tensors, path, **more)
    if len(calls) == int(sys.argv[3]):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = save_file
export(Path(sys.argv[1]), Path(sys.argv[2]), Options(verify=False, tokenizer="none", max_shard_size=30_000))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("README.md", "SHA256SUMS")}


def test_kill_in_the_middle(made, tmp_path):
    checkpoints, folder = made(*UNTIED, *GRU), tmp_path / "folder"
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, checkpoints, folder, "3"], capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and not folder.exists()
    partial = tmp_path / "folder.partial"
    first = {path: path.stat().st_mtime_ns for path in partial.glob("model-*.safetensors")}
    assert len(first) == 2
    os.truncate(min(first), 100)  # and somebody has damaged what was complete
    export(checkpoints, folder, OPTIONS)
    assert not partial.exists()
    assert (folder / max(first).name).stat().st_mtime_ns == first[max(first)]  # was not written once more
    export(checkpoints, tmp_path / "undisturbed", OPTIONS)
    assert content(folder) == content(tmp_path / "undisturbed")


def test_another_checkpoint_takes_nothing_over(made, tmp_path, monkeypatch):
    folder, original = tmp_path / "folder", shards.save_file

    def fail(tensors, path, **more):
        if len(list(path.parent.glob("model-*.safetensors"))) == 3:
            raise OSError("no more")
        original(tensors, path, **more)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no more"):
        patched.setattr(shards, "save_file", fail)
        export(made(*UNTIED, *GRU), folder, OPTIONS)
    other = made(*UNTIED, *GRU, "--seed", "99", "--moe-router-rnn-bias")
    export(other, folder, OPTIONS)
    export(other, tmp_path / "undisturbed", OPTIONS)
    assert content(folder) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("size", ["300B", "", "-1GB", "0"])
def test_sizes(size):
    with pytest.raises(ValueError, match="is no size"):
        shards.read_size(size)
    assert tuple(map(shards.read_size, ("4GB", "1.5 mib", "7"))) == (4 * 10**9, 3 << 19, 7)
