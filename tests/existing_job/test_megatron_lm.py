"""Wrapper and patch with Megatron-LM's real pretrain_gpt.py.

Needs a checkout of the tag core_v0.19.0 or of the main branch, which is not part of this repository::

    git clone --depth 1 --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM DIR
    RMOE_MEGATRON_LM=DIR bash tests/run.sh tests/existing_job
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.checkpoints import assert_same_tensors
from tests.existing_job.jobs import GRU, OWN_ENTRY, ROOT, STOCK, WRAPPER, as_own_entry, losses, start

SOURCE = os.environ.get("RMOE_MEGATRON_LM")
PATCH = ROOT / "patches" / "megatron-lm" / "core_v0.19.0.patch"
SCRIPTS = ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py")

pytestmark = pytest.mark.skipif(
    not SOURCE, reason="needs RMOE_MEGATRON_LM: a checkout of Megatron-LM, tag core_v0.19.0 or main"
)


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """``stock`` and ``patched``: a whole checkout each; ``scripts``: the scripts alone, with the installed Megatron."""
    folder = tmp_path_factory.mktemp("megatron-lm")
    for name in ("stock", "patched"):
        shutil.copytree(Path(SOURCE, "megatron"), folder / name / "megatron")
    for name in ("stock", "patched", "scripts"):
        (folder / name).mkdir(exist_ok=True)
        for script in SCRIPTS:
            shutil.copy(Path(SOURCE, script), folder / name)
    for check in (["--check"], []):
        subprocess.run(["git", "apply", *check, str(PATCH)], cwd=folder / "patched", check=True)
    return folder


@pytest.fixture(scope="module")
def results(checkouts):
    """(exit code, output, checkpoint) of every job; PP2 jobs run on two processes."""
    stock, patched, scripts = (str(checkouts / name / SCRIPTS[0]) for name in ("stock", "patched", "scripts"))
    stages = ["--pipeline-model-parallel-size", "2"]
    jobs = {
        "own gru": (["-c", OWN_ENTRY], [*GRU, "--runs-dir", "runs"], 0),
        "own gru PP2": ([str(ROOT / "tests/existing_job/own_entry.py")], [*GRU, *stages, "--runs-dir", "runs"], 2),
        "wrapped gru": ([*WRAPPER, stock], GRU, 0),
        "wrapped gru PP2": ([*WRAPPER, stock], [*GRU, *stages], 2),
        "wrapped scripts gru": ([*WRAPPER, scripts], GRU, 0),
        "patched gru": ([patched], GRU, 0),
        "patched gru PP2": ([patched], [*GRU, *stages], 2),
        "stock": (["-c", STOCK, stock], [], 0),
        "wrapped linear": ([*WRAPPER, stock], [], 0),
        "patched linear": ([patched], [], 0),
    }
    results = {}
    for name, (command, arguments, torchrun) in jobs.items():
        job = start(checkouts / "jobs" / name.replace(" ", "_"), command, arguments, torchrun)
        results[name] = (*job.end(), job.checkpoint)
    return results


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("wrapped gru", "own gru"),
        ("wrapped scripts gru", "own gru"),
        ("patched gru", "own gru"),
        ("wrapped gru PP2", "own gru PP2"),
        ("patched gru PP2", "own gru PP2"),
        ("wrapped linear", "stock"),
        ("patched linear", "stock"),
    ],
)
def test_the_same_losses_and_weights(results, name, same_as):
    (code, output, checkpoint), (other_code, other_output, other_checkpoint) = results[name], results[same_as]
    assert (code, other_code) == (0, 0), output[-3000:] + other_output[-3000:]
    expected = as_own_entry(losses(output)) if same_as.startswith("own") else losses(output)
    assert len(losses(output)) == 4 + 3 and expected == losses(other_output)
    assert_same_tensors(checkpoint, other_checkpoint)


@pytest.mark.parametrize("name", ["wrapped gru", "patched gru", "stock", "wrapped linear"])
def test_megatron_is_the_checkouts(results, checkouts, name):
    folder = checkouts / ("patched" if name.startswith("patched") else "stock")
    assert f"{folder}/megatron" in results[name][1]  # in the warnings that it gives
