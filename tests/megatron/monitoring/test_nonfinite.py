"""A loss or gradient that is not finite ends every rank with one report, nothing saved, and the run can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megablocks.megatron import preflight
from tests import forked
from tests.distributed.arguments import BASE, DISTRIBUTED_OPTIMIZER, PP2
from tests.forked import REPOSITORY

TORCHRUN = [sys.executable, "-m", "rmoe_megablocks.launcher.agent", "--standalone", "--local-addr", "127.0.0.1"]
MODEL = [*BASE, "--train-iters", "5", "--log-interval", "1"]
SAVING = [*PP2, "--save-interval", "2"]
UNSAVED = ["--no-checkpoints", "--mtp-num-layers", "1"]


def launched(folder: Path, processes: int, fault: str, *argv: str) -> tuple[int, str]:
    """(exit code, terminal output) of the entry with a fault, as the launcher starts it."""
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(processes), "-m", "tests.faults.entry", fault, *MODEL]
        + [*argv, "--runs-dir", str(folder), "--run-name", "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def run(folder: Path, processes: int, fault: str, *argv: str) -> tuple[int, str]:
    """The same in forks; the code is that of all of them."""
    words = (fault, *MODEL, *argv, "--runs-dir", str(folder), "--run-name", "run")
    with forked.ranks("tests.faults.entry:main", words, processes, folder / "log") as ranks:
        (code,) = set(forked.end(ranks, 300, grace=60))
    return code, (folder / "log").read_text()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def table(output: str) -> dict[str, list[str]]:
    """{row: its cells} of the report."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if "|grad|" in line) + 1
    end = next(i for i, line in enumerate(lines) if line.startswith("first place"))
    return {line[:12].strip(): line[12:].split() for line in lines[start:end]}


def test_a_weight_on_the_first_stage(tmp_path):
    code, output = launched(tmp_path, 2, "weight", *SAVING)
    assert code == 1
    assert output.count("iteration 3: the loss of micro-batch 1 is nan (rank 1)") == 1, output[-3000:]
    assert "first place: layer 2, whose weights are not finite" in output
    rows = table(output)
    assert list(rows) == ["embedding", "layer 1", "layer 2", "layer 3", "layer 4", "output", "shared"]
    logit, state, _, weight, finite = rows["layer 1"]
    assert float(logit) > 0 and 0 < float(state) < 4 and float(weight) > 0 and finite == "finite"
    assert rows["layer 2"] == ["nan", "nan", "nan", "nan", "1", "not", "finite"]
    assert rows["layer 4"][:3] == ["nan"] * 3 and rows["layer 4"][4] == "finite"
    folder = tmp_path / "run" / "checkpoints"
    assert f"the same command resumes from iteration 2 in {folder}" in output
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000002"]
    *finished, last = metrics(tmp_path)
    assert [line["iteration"] for line in finished if line["kind"] == "train"] == [1, 2]
    assert last == {"kind": "stopped", "iteration": 3, "stopped": "the loss of micro-batch 1 is nan (rank 1)"}

    code, output = run(tmp_path, 2, "none", *SAVING)
    assert code == 0, output[-3000:]
    assert "continuing from iteration 2" in output and "not finite" not in output
    assert [line["iteration"] for line in metrics(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def gradient_of_one_process(tmp_path_factory) -> tuple[int, str]:
    return run(tmp_path_factory.mktemp("one"), 1, "gradient", *UNSAVED)


def test_a_gradient(gradient_of_one_process):
    code, output = gradient_of_one_process
    assert code == 1, output[-3000:]
    assert "iteration 3: gradients are not finite although every loss is" in output, output[-3000:]
    assert "whose gradient is not finite (1 places in all)" in output and "so it began at layer 3" in output
    rows = table(output)
    assert list(rows)[4:7] == ["layer 4", "mtp layer 1", "output"]
    assert rows["layer 3"][2] == "inf" and rows["layer 4"][2] != "inf"
    logit, state, *norms, finite = rows["mtp layer 1"]
    assert float(logit) > 0 and 0 < float(state) < 4 and all(float(norm) > 0 for norm in norms) and finite == "finite"
    assert "there is no checkpoint: the same command starts from the beginning" in output


def test_scattered_gradients_have_the_norms_of_one_process(tmp_path, gradient_of_one_process):
    """With overlap Megatron would raise on one rank in the middle of backward; afterwards gradients are in shards."""
    code, output = run(tmp_path, 2, "gradient", *UNSAVED, *DISTRIBUTED_OPTIMIZER)
    assert code == 1 and "gradients are not finite although every loss is" in output, output[-3000:]
    one, two = table(gradient_of_one_process[1]), table(output)
    assert one.keys() == two.keys()
    for row, cells in one.items():
        for ours, theirs in zip(two[row], cells, strict=True):
            assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=2e-3), row


@pytest.mark.parametrize(
    ("words", "stops_on", "upstream"),
    [
        ("", ("loss", "gradient"), "disabled"),
        ("--bf16", ("loss", "gradient"), "disabled"),
        ("--fp16 --loss-scale 128", ("loss", "gradient"), "disabled"),
        ("--fp16", ("loss",), "disabled"),
        ("--no-check-for-nan-in-loss-and-grad", (), "validate_results"),
        ("--rerun-mode disabled", ("loss", "gradient"), "disabled"),
        ("--rerun-mode validate_results", (), "validate_results"),
        ("--check-for-large-grads", (), "validate_results"),
    ],
)
def test_who_checks_what(tmp_path, words, stops_on, upstream):
    args = preflight.check([*BASE, "--runs-dir", str(tmp_path), *words.split()]).run.args
    assert args.stop_on_nonfinite == stops_on
    assert args.rerun_mode == upstream
    asks_upstream = not stops_on and "--no-check" not in words
    assert args.check_for_nan_in_loss_and_grad == asks_upstream
