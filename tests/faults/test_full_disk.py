"""A disk that is full: one line, exit code 2, the checkpoint to go on from; with room again, the same command does."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rmoe_megablocks.megatron.checkpoints.files import TRACKER
from tests.checkpoints import assert_same_tensors
from tests.faults import full
from tests.faults.test_kills import ALL_FAULTS, REPOSITORY, TINY, run_steps

ASYNC = "--async-save"
FULL, QUOTA = (
    r"the disk is full \([\d,]+ of [\d,]+ bytes free\)",
    r"the disk quota is used up \([\d,]+ of [\d,]+ bytes free\)",
)
DATA, DENIED = "checkpoints/iter_0000006/__0_0.distcp", "permission denied"


@dataclass(frozen=True)
class Case:
    """A planted error in a run that continues from iteration 4 and saves iteration 6; saying both."""

    plant: str
    place: str
    why: str = FULL
    resumes: int = 4
    options: str = ""

    @property
    def name(self) -> str:
        return f"{self.plant} {self.options}".strip()


ALL = [
    Case("full: data", DATA),
    Case("full: index", "checkpoints"),
    Case("full: config", "checkpoints"),
    Case("full: config", "checkpoints", options=ASYNC),
    Case("full: manifest", "checkpoints/iter_0000006/integrity.json"),
    Case("full: manifest", "checkpoints/iter_0000006/integrity.json", options=ASYNC),
    Case("full: draft of the manifest", "checkpoints"),
    Case("full: tracker", "checkpoints/latest_checkpointed_iteration.txt", resumes=6),
    Case("full: tracker", "checkpoints/latest_checkpointed_iteration.txt", resumes=6, options=ASYNC),
    Case("full: metrics", "metrics.jsonl"),
    Case("full: summary", "summary.json", resumes=6),
    Case("quota: data", DATA, QUOTA),
    Case("broken: data", DATA, r"the storage has failed \(input/output error\)"),
    Case("read-only: data", DATA, "the file system is read-only"),
    Case("denied: tracker", "checkpoints/latest_checkpointed_iteration.txt", DENIED, resumes=6),
]
# Of every test run: a file of each kind (config: test_one_of_two_ranks). The rest with RMOE_TEST_ALL_FAULTS=1.
ALWAYS = ("full: data", f"full: manifest {ASYNC}", "full: tracker", "full: metrics", "full: summary")
CASES = [case for case in ALL if ALL_FAULTS or case.name in ALWAYS]
REAL = {"asynchronous": ASYNC} | ({"synchronous": ""} if ALL_FAULTS else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    yield folder
    for name in (*REAL, "trial", "events", "new"):
        full.unmount(folder / name)


@pytest.fixture(scope="module")
def can_mount(folder) -> bool:
    return full.mount(folder / "trial")


def argv(folder: Path, name: str, *words: str) -> list[str]:
    return [*TINY, "--runs-dir", str(folder), "--run-name", name, "--data-cache-path", str(folder / "cache"), *words]


@pytest.fixture(scope="module")
def results(folder, can_mount) -> dict[str, dict]:
    steps = [
        {"name": "straight", "argv": argv(folder, "straight")},
        {"name": "base", "argv": argv(folder, "base", "--exit-interval", "4")},
    ]
    for case in CASES:
        step = {"folder": str(folder / case.name), "argv": argv(folder, case.name, *case.options.split())}
        steps.append(step | {"name": case.name, "plant": case.plant, "before": ["copy base"]})
        steps.append(step | {"name": f"{case.name} again"})
    for name, options in REAL.items() if can_mount else ():
        step = {"folder": str(folder / name), "argv": argv(folder, name, *options.split())}
        almost, new, figures, no_byte, room = full.BEFORE
        steps.append(step | {"name": name, "before": [almost]})
        steps.append(step | {"name": f"{name} again", "before": [room]})
        steps.append(step | {"name": f"{name} no byte", "before": [no_byte]})
    if can_mount:
        step = {"folder": str(folder / "events"), "argv": argv(folder, "events")}
        steps.append(step | {"name": "events", "before": [almost, room, figures]})
        step = {"folder": str(folder / "new"), "argv": [*TINY, "--runs-dir", str(folder), "--run-name", "new"]}
        steps.append(step | {"name": "new", "before": [new]})
    return run_steps(steps, folder)


def the_line(output: str) -> str:
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("rmoe: error")]
    return line


def assert_continues(folder: Path, name: str, result: dict, iteration: int) -> None:
    assert result["codes"] == [0], result["output"]
    assert f"continuing from iteration {iteration} in {folder / name / 'checkpoints'}" in result["output"]
    (folder / name / "checkpoints" / TRACKER).write_text("6")  # its writing is what failed in some
    assert_same_tensors(folder / name / "checkpoints", folder / "straight" / "checkpoints")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planted(folder, results, case):
    result, place = results[case.name], re.escape(str(folder / case.name))
    assert result["codes"] == [2], result["output"]
    assert re.fullmatch(
        f"rmoe: error: {place}/{re.escape(case.place)}: {case.why}; the same command continues from iteration "
        f"{case.resumes} in {place}/checkpoints",
        the_line(result["output"]),
    ), result["output"]
    assert_continues(folder, case.name, results[f"{case.name} again"], case.resumes)


@pytest.mark.parametrize("name", REAL)
def test_a_disk_that_is_really_full(folder, can_mount, results, name):
    if not can_mount:
        pytest.skip("no small file system can be mounted here: the errors were planted")
    result, place = results[name], re.escape(str(folder / name))
    assert result["codes"] == [2], result["output"]
    said = re.fullmatch(
        rf"rmoe: error: {place}/{DATA}: the disk is full \(([\d,]+) of ([\d,]+) bytes free\); the same command "
        f"continues from iteration 4 in {place}/checkpoints",
        the_line(result["output"]),
    )
    assert said, result["output"]
    assert int(said[1].replace(",", "")) < full.LEFT and int(said[2].replace(",", "")) == full.SIZE
    assert_continues(folder, name, results[f"{name} again"], 4)
    result = results[f"{name} no byte"]  # the lock of the run's folder is the first file
    assert result["codes"] == [2] and "the disk is full (0 of 8,388,608 bytes free)" in the_line(result["output"])
    assert "continues from iteration 6" in the_line(result["output"])


def test_figures_and_indices_on_a_full_disk(folder, can_mount, results):
    """TensorBoard's thread says nothing, the next figure does, whichever is first; NumPy's errors have no number."""
    if not can_mount:
        pytest.skip("no small file system can be mounted here")
    for name, place, start in (
        ("events", r"(?:tensorboard|metrics\.jsonl)", "the same command continues from iteration 4"),
        (
            "new",
            r"data_cache/\w+-MockGPTDataset-train-\w+.npy",
            "there is no complete checkpoint: the same command starts",
        ),
    ):
        assert results[name]["codes"] == [2], results[name]["output"]
        line = the_line(results[name]["output"])
        assert re.match(f"rmoe: error: {re.escape(str(folder / name))}/{place}: {FULL}; {start}", line), line


@pytest.mark.parametrize(
    ("plant", "place"),
    [("0:full: config", "checkpoints"), *([("1:full: metrics", "metrics.jsonl")] if ALL_FAULTS else [])],
)
def test_one_of_two_ranks(tmp_path, plant, place):
    """torchrun ends the other one; the rank that found it speaks, and it alone."""
    words = argv(tmp_path, "two", "--num-workers", "0")
    config = tmp_path / "empty.yaml"
    config.write_text("MODEL_ARGS: {}\n")
    command = [sys.executable, "-W", "ignore", "-m", "rmoe_megablocks.launcher.agent", "--nproc-per-node=2"]
    command += ["--standalone", "--local-addr=127.0.0.1", "-m", "tests.faults.worker", "--config", str(config), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "RMOE_TEST_PLANT": plant}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    line = the_line(done.stdout + done.stderr)
    assert re.search(rf"two/{place}: {FULL}; there is no complete checkpoint: the same command starts from", line)
