"""Options that do nothing without another one: refused with it, and taken beside it."""

import re

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checks import companions
from rmoe_megablocks.megatron.command_line import parser
from tests.distributed.arguments import BASE


def check(words: str) -> None:
    companions.check(arguments.parse([*BASE, *words.split()]))


def options() -> set[str]:
    return set(parser.build(arguments.add_run_arguments)._option_string_actions)


def test_the_table_names_options_that_there_are():
    known = options()
    for need in companions._NEEDS:
        for pattern in need.options.split():
            found = [option for option in known if re.fullmatch(pattern.replace("*", ".*"), option)]
            assert found, f"{pattern}: no option of Megatron's"
        assert set(re.findall(r"--[a-z0-9-]+", need.missing)) <= known, need.missing


@pytest.mark.parametrize(
    "idle, beside",
    [
        ("--num-query-groups 2", "--group-query-attention"),
        ("--moe-router-num-groups 2", "--moe-router-group-topk 1"),
        ("--moe-router-bias-update-rate 0.1", "--moe-router-enable-expert-bias"),
        ("--moe-shared-expert-gate", "--moe-shared-expert-intermediate-size 8"),
        ("--moe-token-drop-policy position", "--moe-expert-capacity-factor 1"),
        ("--recompute-modules moe", "--recompute-activations"),
        ("--recompute-method uniform --recompute-num-layers 1", "--recompute-granularity full"),
        ("--mscale 2", "--position-embedding-type yarn"),
        ("--mscale 2", "--multi-latent-attention"),
        ("--mtp-loss-scaling-factor 0.5", "--mtp-num-layers 1"),
        ("--loss-scale 4", "--bf16"),
        ("--lr-wsd-decay-iters 2", "--lr-decay-style WSD"),
        ("--ckpt-step 5", "--load x"),
    ],
)
def test_refused_alone_and_taken_beside_it(idle, beside):
    with pytest.raises(UsageError, match=f"{idle.split()[0]} .*do(es)? nothing without "):
        check(idle)
    check(f"{idle} {beside}")


def test_megatrons_default_asks_for_nothing():
    check("--num-query-groups 1 --moe-router-bias-update-rate 1e-3 --sgd-momentum 0.9")


def test_an_option_that_a_pattern_begins_with_needs_nothing():
    check("--moe-paged-stash --qk-clip --wandb-project x --moe-shared-expert-intermediate-size 8")
