"""What a signal to the launcher does to the agent and its workers, with processes of the real kinds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Stands in for training: as with Megatron's handler, SIGTERM is noted and the worker ends at a time of its choosing.
WORKER = """
import os, signal, sys, time
folder, what = sys.argv[1:]
rank = os.environ["RANK"]
if what == "fail":
    sys.exit(2)
if what == "crash" and rank == "0":
    raise RuntimeError("crash of a worker")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
open(f"{folder}/{rank}.tmp", "w").write(str(os.getpid()))
os.rename(f"{folder}/{rank}.tmp", f"{folder}/{rank}.pid")
while not asked or what == "stubborn":
    time.sleep(0.02)
time.sleep(0.3)
open(f"{folder}/{rank}.saved", "w").close()
"""

# In place of torchrun's agent where a test needs none of it: it starts two workers and waits.
PLAIN_AGENT = """
import os, subprocess, sys
workers = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(rank)}, start_new_session=True)
    for rank in range(2)
]
sys.exit(max(worker.wait() for worker in workers))
"""

LAUNCHER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
from rmoe_megablocks.launcher.supervise import run_agent
sys.exit(run_agent(sys.argv[1:]))
"""


class Run:
    """A launcher with its agent and two workers."""

    def __init__(self, folder: Path, what: str, plain: bool):
        self.folder = folder
        worker = folder / "worker.py"
        worker.write_text(WORKER)
        if plain:
            agent = [sys.executable, "-c", PLAIN_AGENT]
        else:
            layout = ["--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1"]
            agent = [sys.executable, "-m", "rmoe_megablocks.launcher.agent", *layout]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *agent, str(worker), str(folder), what],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def workers(self) -> list[psutil.Process]:
        """The workers, once both train."""
        files = [self.folder / f"{rank}.pid" for rank in range(2)]
        wait_for(lambda: all(file.exists() for file in files))
        return [psutil.Process(int(file.read_text())) for file in files]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def saved(self) -> bool:
        return all((self.folder / f"{rank}.saved").exists() for rank in range(2))

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(what: str = "train", plain: bool = True) -> Run:
        runs.append(Run(tmp_path, what, plain))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            for process in [*psutil.Process(run.process.pid).children(recursive=True), run.process]:
                process.kill()
            run.process.wait()


STOPPING = "rmoe: stopping, in training with a checkpoint (press again to stop at once)\n"


def test_the_first_signal_saves_and_torchrun_ends_well(start):
    run = start(plain=False)
    run.workers()
    run.signal(signal.SIGINT)
    assert run.end() == (0, STOPPING)
    assert run.saved()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_every_stop_signal_saves(start, number):
    run = start()
    run.workers()
    run.signal(number)
    assert run.end() == (0, STOPPING)
    assert run.saved()


def test_slurm_may_send_its_signal_to_every_process(start):
    """As scancel and srun do. The stand-in worker would die of it, as a checkpoint's helper processes would."""
    run = start(plain=False)
    run.workers()
    for process in [*psutil.Process(run.process.pid).children(recursive=True), run.process]:
        process.send_signal(signal.SIGUSR1)
    assert run.end() == (0, STOPPING)
    assert run.saved()


def test_the_second_signal_ends_everything(start):
    run = start("stubborn")
    workers = run.workers()
    run.signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.signal(signal.SIGINT)
    assert run.end() == (130, STOPPING + "rmoe: stopping at once\n")
    assert all(gone(worker) for worker in workers) and not run.saved()


def test_a_signal_before_there_are_workers_ends_the_start(start):
    run = start(plain=False)
    wait_for(lambda: psutil.Process(run.process.pid).children())
    run.signal(signal.SIGTERM)
    assert run.end() == (143, "rmoe: stopped without a checkpoint\n")
    assert not run.saved()


def test_a_workers_usage_error_ends_the_run_with_2_and_no_report(start):
    assert start("fail", plain=False).end() == (2, "")


def test_a_workers_crash_is_its_own_message_and_one_line(start):
    code, err = start("crash", plain=False).end()
    assert code == 1
    assert "RuntimeError: crash of a worker" in err
    assert err.rstrip().splitlines()[-1].startswith("rmoe: error: rank 0 failed with exit code 1")
    assert "ChildFailedError" not in err and "torch/distributed" not in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_killed_launcher_leaves_nothing_running(start):
    run = start(plain=False)
    workers = run.workers()
    run.process.kill()
    run.process.wait()
    wait_for(lambda: all(gone(worker) for worker in workers))
    assert run.saved()
