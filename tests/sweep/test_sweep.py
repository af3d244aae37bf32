"""``rmoe sweep``: what it starts, leaves out, refuses and passes on; in the launcher's place is a stand-in."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.sweep import running, study

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "tiny.yaml"
STUDY = f"""\
config: {CONFIG}
seeds: [1, 2]
arguments:
  --lr: 0.010
  --save-interval: null
variants:
  one:
    --moe-router-type: linear
  two:
    --moe-router-type: gru
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    def command(run, words, runs_dir, *more):
        place = ["--runs-dir", str(runs_dir), "--run-name", run.name]
        return [sys.executable, "-m", "tests.sweep.stand_in", *words, *place, *more]

    monkeypatch.setattr(running, "_command", command)
    monkeypatch.setattr(running, "check", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def sweep(file, *argv) -> int:
    return cli.main(["sweep", str(file), "--runs-dir", str(file.parent / "runs"), *argv])


def test_the_file_says_what_is_run(file):
    runs = study.read(file).runs
    assert [run.name for run in runs] == ["one-seed1", "two-seed1", "one-seed2", "two-seed2"]
    common = ("--config", str(CONFIG), "--lr", "0.010", "--save-interval=null")
    assert runs[1].words == (*common, "--moe-router-type", "gru", "--seed", "1")


def test_commands_are_the_runs_own(file, capsys):
    """As the launcher gets them from a sweep, for a shell that splits them again."""
    assert sweep(file, "--only", "two-*", "--commands", "--wandb-exp-name", "a b") == 0
    lines, runs = capsys.readouterr().out.splitlines(), study.read(file).runs
    expected = [running._command(run, [*run.words, "--wandb-exp-name", "a b"], file.parent / "runs") for run in runs]
    assert [shlex.split(line) for line in lines] == [command[3:] for command in expected if "two" in command[-1]]
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_are_here(path):
    """Each can be read, and has the runs of its seeds in pairs."""
    runs = study.read(path).runs
    variants = {run.variant for run in runs}
    assert len(runs) == len(variants) * len({run.seed for run in runs}) and len(variants) > 1


def test_runs_what_is_missing_and_compares(file, stand_in, capsys):
    assert sweep(file, "--only", "seed2", "--list") == 0
    assert capsys.readouterr().out == "one-seed2: to do\ntwo-seed2: to do\n"
    assert sweep(file, "--only", "one-seed2") == 0
    assert "one-seed2: done in 0:0" in capsys.readouterr().err
    assert sweep(file, "--jobs", "2") == 0
    told = capsys.readouterr()
    assert "one-seed2" not in told.err and told.err.count(": done in") == 3 and "[4/4]" in told.err
    assert "| two     | 1, 2    | 4.1500 ± 0.0707 | +1.0000 [+1.0000, +1.0000] | higher " in told.out
    assert (file.parent / "runs" / "comparison" / "curves.png").is_file()
    assert sweep(file) == 0
    assert ": done in" not in capsys.readouterr().err


def test_what_the_study_does_not_vary_is_told(file, stand_in, capsys):
    """A configuration that was edited between two runs: their words are the same, their arguments are not."""
    assert sweep(file) == 0
    assert "Warning" not in capsys.readouterr().out
    path = file.parent / "runs" / "two-seed2" / "arguments.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 1.0}))
    assert sweep(file) == 0
    assert "runs also differ in --lr: one: 0.002; two: 0.002 and 1.0" in " ".join(capsys.readouterr().out.split())


def test_a_run_of_other_arguments_is_no_part_of_it(file, stand_in, capsys):
    assert sweep(file, "--only", "one-seed1") == 0
    assert sweep(file, "--lr", "1") == 2
    assert "one-seed1: was made with other arguments (--config" in capsys.readouterr().err


def test_a_failed_run_leaves_the_others_and_is_tried_again(file, stand_in, capsys):
    file.write_text(STUDY.replace("--moe-router-type: linear", "--fail: 'yes'"))
    assert sweep(file) == 1
    told = capsys.readouterr().err
    assert "one-seed1: exit code 3; rmoe: error: no luck; see" in told and "failed: one-seed1, one-seed2" in told
    assert told.count(": done in") == 2
    assert sweep(file, "--list") == 0
    assert "one-seed1: to do\ntwo-seed1: done" in capsys.readouterr().out


def test_a_signal_is_passed_on_and_waited_for(file, stand_in, capsys):
    runs = file.parent / "runs"

    def terminate():
        while not (runs / "one-seed1.waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert sweep(file, "--only", "one-seed1", "--wait", "60") == 130
    thread.join()
    assert (runs / "one-seed1.saved").exists() and signal.getsignal(signal.SIGTERM) == before
    assert "the same command goes on" in capsys.readouterr().err


def test_what_the_launcher_refuses_is_said_before_anything_is_started(file, capsys):
    file.write_text(STUDY.replace("--lr: 0.010", "--lrr: 1"))
    assert sweep(file) == 2
    error = capsys.readouterr().err
    assert "rmoe: error: one-seed1: " in error and "--lrr" in error and not (file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (STUDY, "", "expected the keys config, seeds"),
        ("variants:", "variant:", "line 6: unknown key 'variant' (did you mean variants?)"),
        (f"config: {CONFIG}", "config: nowhere.yaml", "line 1: config: "),
        ("seeds: [1, 2]", "seeds: 3", "line 2: seeds must be a list of whole numbers"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds has one of them twice"),
        ("seeds: [1, 2]", "", "seeds is missing"),
        ("  one:", "  a/b:", "'a/b' is no name for a run"),
        ("--moe-router-type: gru", "--seed: 3", "variants: two: --seed is what the study decides"),
        ("--moe-router-type: gru", "moe-router-type: gru", "'moe-router-type' is not an argument"),
        ("--lr: 0.010", "--lr: {a: 1}", "arguments: --lr must be a value"),
    ],
)
def test_a_wrong_file_is_one_line(file, old, new, told):
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(UsageError) as error:
        study.read(file)
    assert told in str(error.value) and "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--only", "three"], "--only three: no run of that name (one-seed1, "),
        (["word"], "'word' is not an argument"),
    ],
)
def test_wrong_arguments_are_one_line(file, capsys, argv, told):
    assert sweep(file, *argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
