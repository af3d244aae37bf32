"""What --moe-router-impl chooses leaves the loss curve of a training run where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmoe_megablocks.compat import megatron_cpu

REPOSITORY = Path(__file__).parents[2]
ITERATIONS, TOLERANCE = 200, 1e-4  # of the loss, fp32
# torch.cuda.is_available() is what CPU mode says where it is on
OTHERS = ("recompute", *(() if megatron_cpu.needed() else ("triton",)))

pytestmark = pytest.mark.skipif(
    os.environ.get("RMOE_TEST_ALL_KERNELS") != "1", reason="minutes: RMOE_TEST_ALL_KERNELS=1 runs it"
)


def losses(folder: Path, impl: str) -> torch.Tensor:
    """Of every iteration of configs/tiny.yaml in one process."""
    command = [sys.executable, "-m", "rmoe_megablocks.launcher", "--config", "configs/tiny.yaml"]
    command += ["--pipeline-model-parallel-size", "1", "--moe-router-impl", impl, "--train-iters", str(ITERATIONS)]
    command += ["--runs-dir", str(folder), "--run-name", impl, "--no-checkpoints", "--no-final-evaluation"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / impl / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["lm_loss"] for line in lines if line["kind"] == "train"], dtype=torch.float64)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("eager"), "eager")


@pytest.mark.parametrize("impl", OTHERS)
def test_the_loss_curve_is_that_of_eager(eager, impl, tmp_path):
    curve = losses(tmp_path, impl)
    assert len(curve) == len(eager) == ITERATIONS and eager[0] - eager[-1] > 1
    worst = (curve - eager).abs().max().item()
    print(f"{impl}: the loss is off by at most {worst:.1e} in {ITERATIONS} iterations")
    assert worst <= TOLERANCE
