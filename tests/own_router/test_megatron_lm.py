"""The documented router in Megatron-LM's own pretrain_gpt.py, wrapped and patched; see tests/existing_job."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.checkpoints import assert_same_tensors, load_tensors
from tests.existing_job.jobs import OWN_ENTRY, WRAPPER, as_own_entry, losses, start
from tests.existing_job.test_megatron_lm import PATCH, SCRIPTS, SOURCE
from tests.own_router.test_hosts import ROUTER

pytestmark = pytest.mark.skipif(not SOURCE, reason="needs RMOE_MEGATRON_LM: a checkout of Megatron-LM")


def test_wrapped_and_patched_scripts_train_as_our_own_entry_does(package, tmp_path):
    patched = tmp_path / "checkout"
    shutil.copytree(Path(SOURCE, "megatron"), patched / "megatron")
    for script in SCRIPTS:
        shutil.copy(Path(SOURCE, script), patched)
    subprocess.run(["git", "apply", str(PATCH)], cwd=patched, check=True)
    runs = {
        "own": (["-c", OWN_ENTRY], [*ROUTER, "--runs-dir", "runs"]),
        "wrapped": ([*WRAPPER, str(Path(SOURCE, SCRIPTS[0]))], ROUTER),
        "patched": ([str(patched / SCRIPTS[0])], ROUTER),
    }
    jobs = {}
    for name, (command, arguments) in runs.items():
        jobs[name] = start(tmp_path / name, command, arguments, pythonpath=package)
        code, output = jobs[name].end()
        assert code == 0, output[-3000:]
        lines = losses(output)
        expected = lines if name == "own" else as_own_entry(lines)
        assert len(expected) == 4 + 2 and expected == jobs.setdefault("lines", expected)
        assert_same_tensors(jobs[name].checkpoint, jobs["own"].checkpoint)
    assert any("routing_layer.projection" in key for key in load_tensors(jobs["patched"].checkpoint))
