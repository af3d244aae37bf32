"""tests/megatron/fake_cuda.py, in a process without CPU mode, in which torch takes "cuda" for the CPU."""

import os
import subprocess
import sys

from tests.forked import REPOSITORY


def test_the_whole_model_on_a_gpu_that_is_not_there():
    command = [sys.executable, "-m", "tests.megatron.fake_cuda"]
    # Megatron leaves its choice of attention in the environment of whoever built a model before, as this process did
    plain = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    done = subprocess.run(command, cwd=REPOSITORY, env=plain, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.endswith("9 models, 18 backward passes, 2 faults seen\n"), done.stdout
