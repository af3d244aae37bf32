"""The entry as users run it: launched, stopped, resumed, under torchrun; what it leaves and what it refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.checkpoints import flip_in_a_weight
from tests.evaluation.tasks import sets

REPOSITORY = Path(__file__).parents[1]
SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 32 --num-experts 4 "
    "--moe-ffn-hidden-size 32 --moe-router-rnn-hidden-size 16 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 20 --eval-iters 1 --log-interval 5 --save-interval 100"
).split()
ALL_FAULTS = os.environ.get("RMOE_TEST_ALL_FAULTS") == "1"
UNEVALUATED = "--no-final-evaluation"  # which takes longer than the training
LAUNCHER = [sys.executable, "-m", "rmoe_megablocks.launcher"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
ENVIRONMENT.pop("RMOE_CPU_MODE_ANNOUNCED", None)  # this process has said it, the runs are to say it again


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(runs: Path, name: str, *argv: str, command=LAUNCHER) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *SMALL, "--runs-dir", str(runs), "--run-name", name, *argv],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(runs: Path, name: str, *argv: str, command=LAUNCHER) -> str:
    process = start(runs, name, *argv, command=command)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output


def metrics(runs: Path, name: str, kind: str = "train") -> list[dict]:
    path = runs / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    file = runs / f"{name}.pt"
    dcp_to_torch_save(runs / name / "checkpoints" / "iter_0000020", file)
    state = torch.load(file, weights_only=False)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def straight(runs) -> str:
    """Terminal output of a run that nothing disturbed."""
    return run(runs, "straight")


def test_what_a_run_leaves(runs, straight):
    folder = runs / "straight"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"test_bpc", "valid_bpc", "bigram_bpc", "router", "layout", "tokens", "seconds", "seed"} <= set(summary)
    assert (summary["router"], summary["layout"], summary["seed"]) == ("gru", "PP2", 1234)
    assert summary["tokens"] == 20 * 8 * 64 and summary["iterations"] == 20
    assert 0 < summary["test_bpc"] < 8.1 and 3.8 < summary["bigram_bpc"] < 3.9
    lines = metrics(runs, "straight")
    assert [line["iteration"] for line in lines] == list(range(1, 21))
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    (valid,) = metrics(runs, "straight", "valid")
    assert valid["iteration"] == 20 and valid["tokens"] == 8 * 64 and valid["trained_tokens"] == summary["tokens"]
    assert valid["bpc"] == pytest.approx(summary["valid_bpc"], rel=0.1) and not metrics(runs, "straight", "test")
    logged = [line["iteration"] for line in lines if "routing" in line]
    assert logged == [1, 5, 10, 15, 20]
    routing = lines[-1]["routing"]
    assert all(len(values) == 2 for values in routing.values())  # a figure a layer, those of both stages
    assert set(routing) == {"load_balancing_loss", "busiest_expert_share", "router_entropy", "logits_std", "state_norm"}
    assert all(0 < spread < 1 for spread in routing["logits_std"])
    assert all(0.25 <= share <= 1 for share in routing["busiest_expert_share"])
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "20"
    assert list((folder / "tensorboard").iterdir()) and list((folder / "logs").iterdir())
    assert "--num-layers" in (folder / "config.yaml").read_text()


def test_what_the_terminal_shows(straight):
    assert straight.count("CPU mode: no GPU found") == 1
    line = next(line for line in straight.splitlines() if "iteration" in line and "20/20" in line)
    for word in ("loss", "bpc", "tokens/s", "left", "balance", "busiest", "entropy", "logits", "|h|"):
        assert word in line
    assert re.search(
        r"^at the start \| logits' std 0\.\d+ 0\.\d+ \| entropy 1\.\d{3} of 1\.386$", straight, re.MULTILINE
    )
    assert re.search(r"iteration +20/20 \| valid \| loss \d\.\d+ \| bpc \d\.\d+ \| 512 tokens", straight)
    assert re.search(r"test \d\.\d+ bpc, valid \d\.\d+ bpc \(a bigram model", straight)
    assert len(straight.splitlines()) < 25  # Megatron's own output is in the log folder


def test_a_finished_run_is_evaluated_not_trained_again(runs, straight):
    """And of a few tokens its figures are marked as partial, on the terminal and in the file."""
    folder = runs / "straight"
    before, whole = (folder / "metrics.jsonl").read_text(), json.loads((folder / "summary.json").read_text())
    again = run(runs, "straight", "--eval-tokens", "1000")
    assert "continuing from iteration 20" in again and (folder / "metrics.jsonl").read_text() == before
    part = json.loads((folder / "summary.json").read_text())
    assert {key: part[key] for key in ("iterations", "tokens", "seconds")} == {
        key: whole[key] for key in ("iterations", "tokens", "seconds")
    }
    assert "test_bpc" not in part and "bigram_bpc" not in part
    assert part["evaluation"]["test"] == {"tokens": 1000, "of": 49999}
    assert f"test {part['test_bpc_partial']:.3f} bpc (partial: the first 1,000 of 49,999 tokens)" in again
    assert "\r" not in again
    (folder / "summary.json").write_text(json.dumps(whole))


def test_readmes_commands_after_training(runs, straight, tmp_path):
    """As they stand there, one after another."""
    for package in ("transformers", "lm_eval", "trl"):
        pytest.importorskip(package)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(runs / "straight")
    (tmp_path / "runs" / "data").symlink_to(runs / "data")
    (tmp_path / "wiki.test.tokens").write_text(" = A = \n A @-@ b <unk> . \n")
    row = {"instruction": "Say it.", "input": "", "output": "It."}
    (tmp_path / "alpaca.json").write_text(json.dumps([row] * 4))
    sets.folder(tmp_path / "tasks")
    section = (REPOSITORY / "README.md").read_text().partition("## After training")[2].partition("\n## ")[0]
    commands = re.findall(r"^rmoe (.*)$", section, re.MULTILINE)
    said = {}
    for command in commands:
        words = [sys.executable, "-m", "rmoe_megablocks.cli", *shlex.split(command, comments=True)]
        done = subprocess.run(words, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, command + done.stdout + done.stderr
        said[" ".join(words[3:])] = done.stdout
    summary = json.loads((runs / "straight" / "summary.json").read_text())
    of_test = [out for command, out in said.items() if command.endswith("enwik8_1mb") or "parallel-size 2" in command]
    assert len(of_test) == 2
    for out in of_test:
        bits = float(re.search(r"bits per byte +(\S+)", out)[1])
        assert bits == pytest.approx(summary["test_bpc"], abs=1.1e-5)  # five digits are printed
    assert {path.name for path in tmp_path.iterdir()} >= {"tiny-hf", "result.json", "tiny-alpaca"}
    (tasks,) = (out for command, out in said.items() if "--tasks" in command)
    assert all(name in tasks for name in sets.ALL.split(",")) and "stderr" in tasks


def test_the_final_evaluation_is_announced_and_ctrl_c_ends_it(runs):
    one = ("--pipeline-model-parallel-size", "1")
    process = start(runs, "interrupted", *one, "--train-iters", "2", "--no-checkpoints")
    lines = []
    while not lines or not (lines[-1].startswith("evaluating") or lines[-1] == ""):
        lines.append(process.stdout.readline())
    assert "valid (49,999 tokens) and test (49,999 tokens)" in lines[-1] and "--no-final-evaluation" in lines[-1]
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, "".join(lines) + output
    assert time.monotonic() - asked < 15 and "evaluation interrupted by a signal" in output
    summary = json.loads((runs / "interrupted" / "summary.json").read_text())
    assert summary["iterations"] == 2 and summary["tokens"] == 2 * 8 * 64
    assert summary["evaluation"]["test"] == {"left_out": "interrupted by a signal"}
    assert not any("bpc" in key for key in summary)


def test_stopped_and_resumed_equals_undisturbed(runs, straight):
    """By Ctrl-C; tests/launch/test_signals.py sends the other signals. Resumed by torchrun, as typed."""
    name = "stopped"
    process = start(runs, name, UNEVALUATED)
    deadline = time.monotonic() + 120
    while len(metrics(runs, name)) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    stopped = len(metrics(runs, name))
    assert 8 <= stopped < 20 and f"stopped after iteration {stopped}" in output
    assert not (runs / name / "summary.json").exists()

    torchrun = [*TORCHRUN, "--nproc-per-node", "2", "launch/pretrain_rmoe.sh"]
    assert f"continuing from iteration {stopped}" in run(runs, name, UNEVALUATED, command=torchrun)
    assert json.loads((runs / name / "summary.json").read_text())["layout"] == "PP2"
    for ours, theirs in zip(metrics(runs, name), metrics(runs, "straight"), strict=True):
        for key in ("iteration", "lm_loss", "grad_norm", "learning_rate"):
            assert ours[key] == theirs[key]
    ours, theirs = weights(runs, name), weights(runs, "straight")
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_bad_input_is_one_line_before_training(runs):
    """More of it: tests/odd_inputs."""
    process = start(runs, "bad", "--no-such-argument", "1")
    output, _ = process.communicate(timeout=60)
    lines = [line for line in output.splitlines() if not line.startswith("CPU mode")]
    assert process.returncode == 2 and len(lines) == 1, output
    assert lines[0].startswith("rmoe: error: ") and "unrecognized arguments: --no-such-argument" in lines[0]


@pytest.mark.skipif(not ALL_FAULTS, reason="tests/faults has it without a launcher; RMOE_TEST_ALL_FAULTS=1 runs it")
def test_checkpoint_with_a_flipped_byte_is_named_by_one_line(runs, straight):
    """Only the ranks notice that, when they load: all of them end, and one speaks."""
    copy = runs / "flipped" / "checkpoints"
    shutil.copytree(runs / "straight" / "checkpoints", copy)
    file = flip_in_a_weight(copy / "iter_0000020")
    process = start(runs, "flipped", "--save-interval", "10", "--train-iters", "30")
    output, _ = process.communicate(timeout=240)
    lines = [line for line in output.splitlines() if "rmoe: error" in line or "Traceback" in line]
    assert process.returncode == 2 and len(lines) == 1, output
    assert f"iter_0000020 is damaged or incomplete: {file.name} is not as saved; there is no other" in lines[0]
