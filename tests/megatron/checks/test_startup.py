"""The net under a run's start: one line before the first iteration, everything as it was from then on."""

import argparse
import os
import subprocess
import sys

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checks import startup
from tests.distributed.arguments import BASE, PP2

ARGS = argparse.Namespace(lr=0.1)


def net(begun: bool, log=None):
    return startup.in_one_line(lambda: ARGS, lambda: begun, log)


@pytest.mark.parametrize(
    "error", [ValueError("no"), AssertionError("no"), ImportError("no"), NotImplementedError("no")]
)
def test_before_the_first_iteration(error, capsys, tmp_path):
    with pytest.raises(UsageError, match="^no; the traceback is in .*/rank0.log$"), net(False, tmp_path / "rank0.log"):
        raise error
    assert "raise error" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, AssertionError, MemoryError])
def test_from_then_on_nothing_is_caught(error, capsys):
    with pytest.raises(error) as caught, net(True):
        raise error("no")
    assert type(caught.value) is error and capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, OSError])
def test_mistakes_of_ours_stay_what_they_are(error):
    with pytest.raises(error) as caught, net(False):
        raise error("a bug")
    assert type(caught.value) is error


def test_out_of_memory(capsys):
    with pytest.raises(UsageError, match="^out of memory before the first iteration .*rmoe plan"), net(False):
        raise MemoryError("1 TB")


def test_who_lost_contact_leaves_the_word_to_the_other(capsys):
    with pytest.raises(SystemExit) as caught, net(False):
        raise RuntimeError("[gloo] Connection closed by peer")
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert "Traceback" in out and err == "rmoe: rank 0 lost contact with another; its traceback is above\n"


def test_megatrons_own_exit(tmp_path):
    log = tmp_path / "rank0.log"
    log.write_text("loading\n>> '--exit-on-missing-checkpoint' set ... exiting. <<\n\n")
    said = str(startup.ended_early(SystemExit(1), log))
    assert said.startswith(f"Megatron ended the run before its first iteration (exit code 1); its log is {log}")
    assert said.endswith(", which ends with: >> '--exit-on-missing-checkpoint' set ... exiting. <<")
    assert "no data" in str(startup.ended_early(SystemExit("no data"), tmp_path / "missing.log"))


def test_a_rank_that_fails_alone_ends_the_others_and_speaks(tmp_path):
    (tmp_path / "empty.yaml").write_text("MODEL_ARGS: {}")
    agent = [sys.executable, "-m", "rmoe_megablocks.launcher.agent", "--nproc-per-node=2", "--standalone"]
    worker = ["--local-addr=127.0.0.1", "-m", "tests.megatron.checks.startup_entry", "1", "--config", "empty.yaml"]
    run = ["--no-checkpoints", "--runs-dir", ".", "--run-name", "x"]
    done = subprocess.run(
        [*agent, *worker, *BASE, *PP2, *run],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("rmoe: error:")]
    planted = "planted: the rank's own data are missing"
    assert (done.returncode, errors) == (2, [f"rmoe: error: rank 1: {planted}; the traceback is in x/logs/rank1.log"])
    assert "Traceback" not in done.stdout + done.stderr
    assert f"AssertionError: {planted}" in (tmp_path / "x/logs/rank1.log").read_text()
