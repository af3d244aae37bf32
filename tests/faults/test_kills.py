"""A run killed at any point of a save goes on from the last complete checkpoint and ends as if nothing had happened.

All kill points are those of one process: what they leave on disk does not depend on the number of ranks. The soak
(tests/soak.py) kills runs of two processes at random moments.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked
from tests.checkpoints import assert_same_tensors
from tests.faults.kill_points import POINTS

REPOSITORY = Path(__file__).parents[2]
ALL_FAULTS = os.environ.get("RMOE_TEST_ALL_FAULTS") == "1"
MARK = "RMOE_TEST_KILLS"  # an environment variable by which to find what these tests started
TINY = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 16 --moe-router-type gru --moe-router-rnn-hidden-size 8 --seq-length 16 --vocab-size 64 "
    "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 --swiglu --normalization RMSNorm "
    "--moe-token-dispatcher-type alltoall --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --lr 1e-3 --min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 "
    "--log-interval 100 --seed 1234 --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 6 --save-interval 2"
).split()


@dataclass(frozen=True)
class Case:
    """A kill in the save of iteration 4 of a run that had saved iteration 2, and where the next start goes on."""

    kill: str
    resumes: int | None
    said: str = ""
    options: str = ""
    fresh: bool = False  # killed before anything was saved
    before: str = ""
    code: int = -signal.SIGKILL

    @property
    def name(self) -> str:
        return "-".join(word for word in (self.kill, self.options, self.before, "fresh" * self.fresh) if word)


STALE = "complete, though latest_checkpointed_iteration.txt still names iter_0000002"
ALL = [
    Case("in a step", 2),
    Case("in the data", 2),
    Case("SIGTERM in the data", 5, code=0),  # it saves to the end, and once more when it stops
    Case("before metadata.json", 2),
    Case("before the manifest", 2),
    Case("half of the manifest", 2),
    Case("before the tracker", 4, STALE),
    Case("half of the tracker", 4, STALE),
    Case("while an old one is deleted", 4, options="--save-retain-interval 1000"),
    Case("in the data, asynchronously", 2, options="--async-save"),
    Case("half of the tracker", 4, STALE, options="--async-save"),
    Case("in the data", None, "from the beginning: iter_0000002 is incomplete", fresh=True),
    Case("half of a dataset index", None, fresh=True),
    # left by Megatron itself, which opens the tracker and then writes it
    Case("in a step", 2, "is empty", options="--save-retain-interval 1000", before="empty tracker"),
]
# Left to RMOE_TEST_ALL_FAULTS=1: a moment later, or the same with another writer
NOT_ALWAYS = ("before metadata.json", "before the manifest", "before the tracker", "half of the tracker---async-save")
CASES = [case for case in ALL if ALL_FAULTS or case.name not in NOT_ALWAYS]


def run_steps(steps: list[dict], folder: Path, mark: bool = False) -> dict[str, dict]:
    """Runs the steps of steps.py, with ``mark`` in a process of its own: MARK is in the environment it starts with."""
    file, log = folder / "steps.json", folder / "steps.log"
    file.write_text(json.dumps(steps))
    if mark:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), MARK: str(folder)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.faults.steps", str(file)]
        subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=1800)
    else:
        with forked.started("tests.faults.steps:main", (file,), log, [{}]) as processes:
            assert forked.end(processes, 1800) == [0], log.read_text()
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    def argv(name: str, *words: str) -> list[str]:
        return [*TINY, "--runs-dir", str(folder), "--run-name", name, *words]

    steps = [
        {"name": "straight", "argv": argv("straight")},
        {"name": "base", "argv": argv("base", "--exit-interval", "2")},
    ]
    for case in CASES:
        step = {"folder": str(folder / case.name), "argv": argv(case.name, *case.options.split())}
        before = [] if case.fresh else ["copy base"]
        before += [case.before] if case.before else []
        steps.append(step | {"name": f"{case.name} killed", "kill": case.kill, "before": before})
        steps.append(step | {"name": f"{case.name} resumed", "before": ["empty tracker"] if case.before else []})
    return run_steps(steps, folder, mark=True)


def test_every_kill_point_is_tried():
    assert {case.kill for case in ALL} == set(POINTS)
    assert {case.name for case in ALL}.issuperset(NOT_ALWAYS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_and_resumed_equals_undisturbed(folder, results, case):
    killed, resumed = results[f"{case.name} killed"], results[f"{case.name} resumed"]
    assert killed["codes"] == [case.code], killed["output"]
    assert resumed["codes"] == [0], resumed["output"]
    lines = [line for line in resumed["output"].splitlines() if "continuing from" in line or "beginning" in line]
    if case.resumes is None:
        assert not any("continuing" in line for line in lines)
    else:
        assert f"continuing from iteration {case.resumes} in {folder / case.name / 'checkpoints'}" in lines[0]
    assert case.said in "".join(lines) and len(lines) == (1 if case.resumes or case.said else 0)
    if not case.said:
        assert "(" not in "".join(lines)  # nothing that needs a reason
    assert_same_tensors(folder / case.name / "checkpoints", folder / "straight" / "checkpoints")


def marked(folder: Path) -> list[bytes]:
    """Command lines of the processes that the runs in ``folder`` have left."""
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (process / "environ").read_bytes():
                left.append((process / "cmdline").read_bytes().replace(b"\0", b" "))
        except OSError:  # it has ended, or is another user's
            continue
    return left


def test_nothing_outlives_a_killed_rank(folder, results):
    """Not the processes that write asynchronously either, nor those that hold the writers' results.

    The workers of a data loader look every 5 seconds whether their rank is there (torch/utils/data/_utils/worker.py).
    """
    deadline = time.monotonic() + 15
    while marked(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert results and not marked(folder)
