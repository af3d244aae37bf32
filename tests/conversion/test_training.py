"""Pre-training goes on from a re-imported checkpoint as from the original, in its layout and in others. Minutes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.importing import import_folder
from rmoe_megablocks.launcher.config import REPOSITORY
from tests.conversion.cells import ALL_CELLS

SIZES = (
    "--config configs/tiny.yaml --train-iters 4 --save-interval 4 --no-final-evaluation --eval-iters 1 "
    "--eval-interval 100 --seq-length 64 --max-position-embeddings 64 --global-batch-size 8 --hidden-size 64 "
    "--moe-ffn-hidden-size 96 --moe-router-rnn-hidden-size 16"
).split()
LAYOUTS = {
    "PP2": [],
    "one process, MegaBlocks": "--pipeline-model-parallel-size 1 --moe-backend megablocks".split(),
    "EP2": "--pipeline-model-parallel-size 1 --expert-model-parallel-size 2".split(),
}


def losses(runs: Path, name: str, *argv: str) -> list[float]:
    command = ["bash", "launch/pretrain_rmoe.sh", *SIZES, "--runs-dir", str(runs), "--run-name", name, *argv]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    return [point["lm_loss"] for point in points if point["kind"] == "train"]


@pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1")
def test_losses(tmp_path):
    losses(tmp_path, "first")
    checkpoints = tmp_path / "first" / "checkpoints"
    export(checkpoints, tmp_path / "folder", Options(verify=False, tokenizer="bytes"))
    import_folder(tmp_path / "folder", tmp_path / "again")
    more = ["--finetune", "--seed", "77"]
    original = losses(tmp_path, "original", "--load", str(checkpoints), *more)
    assert len(original) == 4 and original[0] != original[3]
    for name, layout in LAYOUTS.items():
        found = losses(tmp_path, name.replace(", ", " "), "--load", str(tmp_path / "again"), *more, *layout)
        assert found == pytest.approx(original, abs=1e-6), name
