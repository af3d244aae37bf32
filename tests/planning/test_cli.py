"""rmoe plan: what it prints and its exit codes."""

import json
import os
import re
import subprocess
import sys

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.launcher.config import REPOSITORY

PAPER = "configs/rmoe_0.9b_8xa100.yaml"


def plan(capsys, *argv, code=0):
    assert cli.main(["plan", *argv]) == code
    return capsys.readouterr()


def plan_json(capsys, *argv, code=0):
    return json.loads(plan(capsys, *argv, "--json", code=code).out)


def test_a_page_for_people(capsys):
    page = plan(capsys, PAPER).out
    for words in ("rmoe_0.9b_8xa100: gru router, 8 ranks (DP8), 80 GiB", "1,069,103,104", "largest micro-batch"):
        assert words in page
    assert max(map(len, page.splitlines())) <= 120


def test_json(capsys):
    found = plan_json(capsys, PAPER)
    assert found["parameters"]["total"] == 1_069_103_104
    assert found["parameters"]["routing"] == 24 * (1280 * 128 + 16 * 128) + 6 * 128**2 + 6 * 128
    assert found["layout"]["data"] == 8 and found["layout"]["microbatches"] == 70
    parts = found["memory_per_rank"]
    names = ("weights", "gradients", "optimizer", "activations", "workspace")
    assert parts["total"] == sum(parts[name] for name in names)
    assert list(parts["recompute"]) == ["none", "core_attn", "moe", "core_attn moe", "full"]
    assert found["fits"] and found["warnings"] == []


def test_figures_of_the_paper(capsys):
    """Per token and layer the projector takes 0.33 MFLOP and the GRU 0.20, about 1 % of the forward pass."""
    found = plan_json(capsys, PAPER)["flops_per_token"]
    assert found["routing_forward"] == 24 * 2 * (1280 * 128 + 6 * 128**2 + 128 * 16)
    linear = plan_json(capsys, "configs/smoe_0.9b_8xa100.yaml")["parameters"]
    # 322M active outside the embeddings (paper: 334M, 1065M in all, from the same sizes)
    assert (linear["active"] - linear["embeddings"]) // 10**6 == 322 and linear["total"] // 10**6 == 1065


def test_the_command_line_beats_the_configuration(capsys):
    wide = plan_json(capsys, PAPER, "--moe-router-rnn-hidden-size", "256", "--micro-batch-size=7")
    assert wide["parameters"]["routing"] == 24 * (1280 * 256 + 16 * 256) + 6 * 256**2 + 6 * 256
    assert wide["layout"]["microbatches"] == 20
    assert (
        plan_json(capsys, PAPER, "--no-bf16", "--micro-batch-size", "1")["memory_per_rank"]["weights"]
        == 4 * 1_069_103_104
    )


def test_ranks_and_memory(capsys, monkeypatch):
    assert plan_json(capsys, PAPER, "--nnodes", "2", "--global-batch-size", "1120")["layout"]["data"] == 16
    assert plan_json(capsys, PAPER, "--world-size", "4")["layout"]["data"] == 4
    assert plan_json(capsys, PAPER, "--gpu-memory", "141")["memory_per_rank"]["gpu"] == 141 * 2**30
    monkeypatch.setenv("RMOE_WORLD_SIZE", "16")
    assert plan_json(capsys, PAPER)["layout"]["data"] == 16
    assert plan_json(capsys, PAPER, "--nproc-per-node", "8")["layout"]["data"] == 8


def test_traffic(capsys):
    found = plan_json(capsys, "configs/rmoe_0.9b_4x8xa100.yaml")
    sent, steps = found["sent_per_rank_and_step"], found["layout"]["microbatches"]
    tokens = 2 * 4096
    assert steps == 1120 // (2 * 16)
    # one boundary: each stage sends one message a micro-batch, [S, B, 1280] in bf16 and a state of 128 in fp32
    assert sent["pipeline_state"] == steps * tokens * 128 * 4
    assert sent["pipeline"] == steps * tokens * (1280 * 2 + 128 * 4)
    # 12 layers, there and back, forward and backward; 3 of 4 tokens leave the rank
    assert sent["all_to_all"] == steps * 12 * 2 * tokens * 4 * 3 // 4 * (2 * 1280 * 2 + 4)
    alone = plan_json(capsys, PAPER, "--world-size", "1")["sent_per_rank_and_step"]
    assert set(alone.values()) == {0}


@pytest.mark.parametrize(
    ("typed", "warning"),
    [
        ("--gpu-memory 16", "needs .* GiB a rank of .* usable"),
        ("--transformer-impl local --micro-batch-size 5", "recompute core_attn makes it fit"),
    ],
)
def test_what_does_not_fit_is_told(capsys, typed, warning):
    found = plan_json(capsys, PAPER, *typed.split(), code=1)
    assert not found["fits"]
    assert any(re.search(warning, line) for line in found["warnings"]), found["warnings"]
    assert "warning: " in plan(capsys, PAPER, *typed.split(), code=1).out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.yaml"], "configuration file nowhere.yaml does not exist"),
        ([PAPER, "--num-layers", "many"], "--num-layers: invalid value: 'many' is not a whole number"),
        ([PAPER, "--nmu-layers", "3"], "unrecognized arguments: --nmu-layers 3 (did you mean --num-layers?)"),
        ([PAPER, "--moe-router-type", "lsmt"], "--moe-router-type: unknown router type 'lsmt', did you mean lstm?"),
        ([PAPER, "--pipeline-model-parallel-size", "16"], "8 ranks for a layout of 16"),
        ([PAPER, "--world-size", "8", "--nnodes", "2"], "give one or the other"),
        ([PAPER, "--gpu-memory", "0"], "--gpu-memory 0: expected GiB above 0"),
        ([PAPER, "--fp8-format", "e4m3"], "cannot compute with --fp8-format"),
        ([PAPER, "stray"], "'stray' is not an argument"),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    error = plan(capsys, *argv, code=2).err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--micro-batch-size 3", "--global-batch-size over micro-batch x data parallel: 1120 is not a multiple of 24"),
        ("--pipeline-model-parallel-size 5 --world-size 10", "--num-layers over .*: 24 is not a multiple of 5"),
        ("--pipeline-model-parallel-size 3", "ranks over tensor x pipeline x context parallel: 8 is not"),
        ("--expert-model-parallel-size 3 --world-size 6 --global-batch-size 12", "experts over .*: 16"),
        ("--tensor-model-parallel-size 8 --sequence-parallel", "--num-attention-heads over .*: 20 is not"),
        ("--tensor-model-parallel-size 2", "need --sequence-parallel"),
        ("--vocab-size=null --padded-vocab-size 513 --tensor-model-parallel-size 2 --sequence-parallel", "--padded-vo"),
        ("--num-virtual-stages-per-pipeline-rank 2", "virtual stages without --pipeline-model-parallel-size"),
        ("--context-parallel-size 2 --seq-length 4098 --micro-batch-size 1", "--seq-length over 2 x --context"),
        ("--expert-model-parallel-size 8 --world-size 12 --global-batch-size 24", "ranks over expert x"),
    ],
)
def test_what_does_not_divide_is_refused(capsys, typed, line):
    error = plan(capsys, PAPER, *typed.split(), code=2).err
    assert re.search(line, error) and error.count("\n") == 1, error


def test_what_is_not_looked_at_is_told(capsys):
    found = plan_json(capsys, PAPER, "--attention-softmax-in-fp32", "--fp32-residual-connection")
    assert found["warnings"] == ["not looked at, figures are those without: --fp32-residual-connection"]


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_planned_without_a_remark(capsys, config):
    assert plan_json(capsys, str(config), "--vocab-size", "50000")["warnings"] == []


def test_a_batch_that_nobody_named_is_megatrons(capsys):
    found = plan_json(capsys, PAPER, "--global-batch-size=null")
    assert found["layout"]["microbatches"] == 1 and found["layout"]["data"] == 8


def test_other_commands_still_refuse_unknown_arguments(capsys):
    assert cli.main(["doctor", "--num-layers", "4"]) == 2
    assert "unrecognized arguments: --num-layers 4" in capsys.readouterr().err


def test_it_prints_nothing_but_the_plan():
    """In a process of its own: Megatron's parser is imported, and says nothing of CPU mode or missing kernels."""
    command = [sys.executable, "-m", "rmoe_megablocks.cli", "plan", PAPER, "--no-swiglu", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RMOE_")}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout)["fits"] and done.stderr == ""
