"""launch/slurm/train.sbatch in a real SLURM: two nodes, one process each, over gloo. See run.sh, which starts this.

The time limit counts in minutes, so the test that compares weights does not wait for it: scancel sends the batch
script the very signal that the limit sends. Another test waits for the limit itself.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import assert_same_tensors

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "slurm" / "train.sbatch"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.environ.get("RMOE_TEST_SLURM") != "1", reason="minutes: bash tests/slurm/run.sh"),
]

SMALL = """
--config configs/tiny.yaml --num-layers 2 --hidden-size 32 --ffn-hidden-size 32 --moe-ffn-hidden-size 32
--num-experts 4 --moe-router-rnn-hidden-size 16 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 2 --global-batch-size 4 --eval-iters 1
""".split()
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
SECONDS = 600  # to wait for anything; a shared machine may be slow


class Cluster:
    """A running SLURM; jobs are submitted from ``folder``, where their logs and runs are."""

    def __init__(self, conf: Path, folder: Path) -> None:
        self.folder = folder
        # what a user has in a terminal, and not what this test process has (RANK, PYTEST_...)
        self.env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.env |= {"SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        self.env |= {"RMOE_INTERFACE": "lo", "RMOE_CHECK": "0"}

    def command(self, *words: str, **variables: str) -> str:
        env = self.env | variables
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, env=env, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        return self.command("sbatch", "--parsable", "--nodes=2", *options, str(TRAIN), *arguments, **variables)

    def log(self, job: str) -> str:
        path = self.folder / f"rmoe-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, job: str, condition) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline and self.state(job) in ACTIVE, self.log(job)
            time.sleep(0.2)

    def state(self, job: str) -> str:
        return self.command("squeue", "--noheader", "--jobs", job, "--format=%T", "--states=all") or "gone"

    def end(self, job: str) -> str:
        """The final state of a job, requeues included."""
        deadline = time.monotonic() + SECONDS
        while (state := self.state(job)) in ACTIVE:
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.5)
        return state

    def metrics(self, run: str) -> list[dict]:
        path = self.folder / "runs" / run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The daemons end when the pipe to them closes, however this process ends."""
    script = ["bash", str(ROOT / "tests/slurm/cluster.sh"), "--install"]
    process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    word, _, rest = process.stdout.readline().strip().partition(" ")
    if word == "ready":
        yield Cluster(Path(rest) / "slurm.conf", tmp_path_factory.mktemp("slurm"))
    process.stdin.close()
    code = process.wait(timeout=120)
    if word == "skip":
        pytest.skip(rest)
    assert (word, code) == ("ready", 0), "the cluster did not start; its messages are above"


def test_a_requeued_run_ends_with_the_weights_of_an_uninterrupted_one(cluster):
    training = [*SMALL, "--train-iters", "60", "--save-interval", "20"]
    job = cluster.submit(*training, "--run-name", "uninterrupted")
    assert cluster.end(job) == "COMPLETED", cluster.log(job)

    job = cluster.submit(*training, "--run-name", "requeued")
    # after the first regular checkpoint, whose helper process has to survive the signal
    cluster.wait_for(job, lambda: len(cluster.metrics("requeued")) >= 25)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    assert cluster.end(job) == "COMPLETED", cluster.log(job)

    log = cluster.log(job)
    assert f"rmoe: job {job}: the time limit is near, saving\n" in log
    stopped = int(re.search(r"stopped after iteration (\d+): checkpoint in", log).group(1))
    assert f"rmoe: job {job} on n[1-2]: restart 1\n" in log
    assert f"continuing from iteration {stopped} in" in log
    assert 25 <= stopped < 60
    assert_same_tensors(*(cluster.folder / "runs" / run / "checkpoints" for run in ("uninterrupted", "requeued")))
    uninterrupted, requeued = (
        [(line["iteration"], line["lm_loss"], line["grad_norm"]) for line in cluster.metrics(run)]
        for run in ("uninterrupted", "requeued")
    )
    assert len(requeued) == 60 and requeued == uninterrupted


def test_the_time_limit_itself_requeues(cluster):
    """SLURM looks every 30 seconds and sends up to 30 seconds early: here 60 to 90 seconds after the start."""
    options = ("--time=3", "--signal=B:USR1@90")
    job = cluster.submit(*SMALL, "--train-iters", "1000000", "--run-name", "limit", options=options)
    cluster.wait_for(job, lambda: f"rmoe: job {job} on n[1-2]: restart 1\n" in cluster.log(job))
    cluster.command("scancel", job)
    cluster.end(job)
    log = cluster.log(job)
    assert f"rmoe: job {job}: the time limit is near, saving\n" in log
    assert "stopped after iteration" in log and f"rmoe: job {job}: requeued\n" in log


def test_a_signal_before_training_does_not_requeue_for_ever(cluster):
    job = cluster.submit(*SMALL, options=("--time=1", "--signal=B:USR1@300"))  # a lead longer than the time
    assert cluster.end(job) == "FAILED"
    assert re.search(
        r"rmoe: error: the time limit's signal came \d+ s after the start, before anything could be saved: not requ",
        cluster.log(job),
    )


def test_a_mistake_is_one_line_before_the_nodes_start(cluster):
    job = cluster.submit("--config", "none.yaml", RMOE_CHECK="1")
    assert cluster.end(job) == "FAILED"
    errors = [line for line in cluster.log(job).splitlines() if "rmoe: error" in line]
    assert errors == ["rmoe: error: configuration file none.yaml does not exist"]


def test_a_layout_that_two_nodes_cannot_have_is_one_line(cluster):
    job = cluster.submit(*SMALL, "--expert-model-parallel-size", "4", RMOE_NPROC_PER_NODE="1", RMOE_CHECK="1")
    assert cluster.end(job) == "FAILED"
    errors = [line for line in cluster.log(job).splitlines() if "rmoe: error" in line]
    assert len(errors) == 1 and "2 processes for a layout of 8" in errors[0]
