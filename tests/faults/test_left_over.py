"""No process of a run outlives it: after a traceback in a rank, and after SIGKILL of the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_kills import ALL_FAULTS, MARK, REPOSITORY, TINY, marked

SECONDS = 6.5  # a data loader's worker looks every 5 seconds whether its rank is there
LONG = "--train-iters 100000 --save-interval 2 --save-retain-interval 1000000 --num-workers 2 --log-interval 1".split()


def start(folder: Path, module: list[str], options: str, plant: str = "") -> subprocess.Popen:
    """A run of two ranks, which everything that it starts can be found by."""
    config = folder / "empty.yaml"
    config.write_text("MODEL_ARGS: {}\n")
    words = ["--config", str(config), *TINY, *LONG, *options.split(), "--runs-dir", str(folder), "--run-name", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), MARK: str(folder)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *module, *words],
        env=environment | {"RMOE_TEST_PLANT": plant},
        cwd=folder,
        stdout=(folder / "output").open("w"),
        stderr=subprocess.STDOUT,
    )


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


AGENT = ["rmoe_megablocks.launcher.agent", "--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1", "-m"]


EVERY = [(0, ""), (1, "--async-save"), *([(0, "--async-save"), (1, "")] if ALL_FAULTS else [])]


@pytest.mark.parametrize(("rank", "options"), EVERY)
def test_after_a_traceback(tmp_path, rank, options):
    run = start(tmp_path, [*AGENT, "tests.faults.worker"], options, f"{rank}:traceback")
    try:
        code, output = run.wait(120), (tmp_path / "output").read_text()
        assert code == 1 and "RuntimeError: planted" in output, output
        assert wait_until(lambda: not marked(tmp_path), SECONDS), marked(tmp_path)
    finally:
        run.kill()


@pytest.mark.parametrize("options", ["--async-save", *([""] if ALL_FAULTS else [])])
def test_after_a_killed_launcher(tmp_path, options):
    run = start(tmp_path, ["rmoe_megablocks.launcher", "--nproc-per-node=2"], options)
    try:
        saved = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert wait_until(saved.exists, 120), (tmp_path / "output").read_text()
        assert len(marked(tmp_path)) >= 7  # launcher, agent, and two ranks with helpers
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert wait_until(lambda: not marked(tmp_path), SECONDS + 2), marked(tmp_path)  # ranks save a checkpoint
    finally:
        run.kill()
