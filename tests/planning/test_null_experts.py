"""Null experts in a plan: expectations for balanced routing, exact where they are parameters."""

from dataclasses import replace

import pytest

from rmoe_megablocks.planning import read_settings
from rmoe_megablocks.planning.counts import flops, memory, parameters, traffic
from rmoe_megablocks.planning.plan import make_plan
from rmoe_megablocks.planning.report import text
from tests.planning.test_settings import SIZES

E, M, K = 8, 24, 4
EXPERTS = f"--num-experts {E} --moe-router-topk {K} --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall "
MODEL = SIZES + EXPERTS + "--expert-model-parallel-size 2 --disable-bias-linear --swiglu"


def settings(*more: str):
    return read_settings([*MODEL.split(), *more])


@pytest.mark.parametrize("router", ["linear", "gru"])
def test_figures_are_those_of_the_mean_number_of_experts(router):
    null = settings("--moe-router-type", router, "--moe-null-experts", str(M))
    none = settings("--moe-router-type", router)
    share = E / (E + M)  # of K choices: 1 expert a token in the mean
    with_null, without = flops.flops(null), flops.flops(none)
    assert with_null.experts == without.experts * share
    assert with_null.experts + with_null.saved == without.experts and without.saved == 0
    experts = parameters.model(null).experts
    assert parameters.model(null).total - parameters.active(null) == experts - experts * K * share / E
    assert traffic.traffic(null, 2).all_to_all == traffic.traffic(none, 2).all_to_all * share
    rows = 4 * null.num_layers * M * null.hidden_size  # of the linear matrix
    if router == "linear":
        assert parameters.model(null).total - parameters.model(none).total == rows // 4
        assert with_null.routing - without.routing == 2 * rows // 4
    assert memory.fullest(null, 2).activations > memory.fullest(none, 2).activations  # logits; as many rows at most


def test_more_choices_than_experts():
    many = settings("--moe-null-experts", str(M), "--moe-router-topk", "12")
    assert many.most_experts == E and many.expected_experts == 12 * E / (E + M)


def test_what_is_told():
    null = settings("--moe-null-experts", str(M))
    plan = make_plan(null, 2, 80)
    told = plan.as_dict()
    assert told["experts_per_token"] == {"expected_when_balanced": 1.0, "at_most": K}
    assert told["flops_per_token"]["saved_by_null_experts_forward"] == plan.flops.saved > 0
    assert "null experts save (1 of 4 expected)" in text(plan, "model")
    assert any("is an expectation, for balanced routing" in line for line in plan.warnings)
    plain = make_plan(replace(null, null_experts=0), 2, 80)
    assert "null" not in text(plain, "model") and "experts_per_token" not in plain.as_dict()
    assert "saved_by_null_experts_forward" not in plain.as_dict()["flops_per_token"]
