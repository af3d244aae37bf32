"""Reading arguments without Megatron: its defaults, and what is told when something is missing or wrong."""

import argparse

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.arguments import add_run_arguments
from rmoe_megablocks.planning.settings import FLAGS, UNKNOWN, VALUES, read_settings

from megatron.training.arguments import add_megatron_arguments  # isort: skip  after CPU mode

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --vocab-size 100 "
    "--max-position-embeddings 32 "
)


@pytest.fixture(scope="module")
def actions():
    parser = add_run_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser._option_string_actions


def test_megatron_knows_every_option_that_a_plan_reads(actions):
    assert [option for option in (*VALUES, *FLAGS, *UNKNOWN) if option not in actions] == []


@pytest.mark.parametrize("option", VALUES)
def test_defaults_are_megatrons(actions, option):
    default = actions[option].default
    assert getattr(default, "name", default) == VALUES[option][1]  # --attention-backend is an enum


def read(extra=""):
    return read_settings((SIZES + extra).split())


def test_what_follows_from_other_arguments():
    settings = read("--swiglu --num-experts 8 --tensor-model-parallel-size 2")
    assert (settings.head_size, settings.query_groups, settings.ffn_size) == (16, 4, 128)
    assert (settings.expert_ffn_size, settings.expert_tensor, settings.vocab_size) == (128, 2, 256)
    assert read("--num-experts 8").ffn_size == 256
    assert read("--dataset nowhere").vocab_size == 128
    assert read("--bf16").fused_attention and not read().fused_attention  # fp32 has no fused kernel


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [("1", [1, 1, 1, 1]), ("2", [1, 0, 1, 0]), ("([0]*1+[1]*3)", [0, 1, 1, 1]), ("[0,1,1,0]", [0, 1, 1, 0])],
)
def test_dense_layers(frequency, expected):
    assert read(f"--num-experts 8 --moe-layer-freq {frequency}").moe_layers == tuple(map(bool, expected))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num-layers 4", "--hidden-size is missing"),
        (SIZES + "--num-layers four", "--num-layers: 'four' is not a whole number"),
        (SIZES + "--num-layers 0", "--num-layers: must be at least 1, got 0"),
        (SIZES + "--num-layers 4 5", "--num-layers: expected one value, found 2"),
        (SIZES + "--multi-latent-attention", "cannot compute with --multi-latent-attention"),
        (SIZES + "--num-experts 8 --moe-layer-freq [1]*3", "--moe-layer-freq: .* neither a number nor a list of 4"),
        (SIZES + "--num-experts 8 --moe-layer-freq __import__('os')", "--moe-layer-freq"),
        (SIZES.replace("--vocab-size 100", "--mock-data"), "the vocabulary's size is not known"),
        (SIZES.replace("--vocab-size 100", "--dataset nowhere"), "--dataset: .*nowhere"),
    ],
)
def test_errors_are_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_settings(argv.split())
    assert "\n" not in str(caught.value)
