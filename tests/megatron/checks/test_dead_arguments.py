"""No argument is taken and ignored: the list of those that do nothing, held against the installed Megatron."""

import argparse

import pytest

from rmoe_megablocks.compat.megatron.dead_arguments import DEAD, HARMLESS, OTHER_PROGRAMS, refuse_dead_arguments
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from tests.megatron.checks.dead_arguments import unread

from megatron.training.arguments import add_megatron_arguments  # isort: skip  after CPU mode

# validate_args alone reads these, and says so or writes what they mean into other arguments
TRANSLATED = {
    "--batch-size",
    "--checkpoint-activations",
    "--cuda-graph-scope",
    "--grad-reduce-in-bf16",
    "--no-weight-decay-cond-type",
    "--recompute-activations",
}


@pytest.fixture(scope="module")
def parser():
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def refused(option: str) -> bool:
    return option in DEAD or option.startswith(tuple(OTHER_PROGRAMS))


def test_every_argument_that_nothing_reads_is_refused_by_name(parser):
    found = unread(parser)
    assert "--rampup-batch-size" in found and "--lr" not in found
    assert [option for option in found - TRANSLATED - set(HARMLESS) if not refused(option)] == []


def test_the_list_names_options_that_there_are(parser):
    options = set(parser._option_string_actions)
    assert {*DEAD, *HARMLESS} <= options
    assert [start for start in OTHER_PROGRAMS if not any(option.startswith(start) for option in options)] == []


@pytest.mark.parametrize(
    "word", ["--rampup-batch-size 4 4 100", "--use-flash-attn", "--rl-profile", "--sft-tokenizer-prompt-format=x"]
)
def test_refused_when_given(word):
    option = word.split()[0].split("=")[0]
    with pytest.raises(UsageError, match=option):
        arguments.parse(word.split())


def test_what_is_so_anyway_may_be_asked_for():
    refuse_dead_arguments(HARMLESS)
