"""--moe-router-init fan_in: every rank starts from the numbers that its place in the model gets in any layout."""

import math

import pytest
import torch

from tests.distributed.arguments import SIZES
from tests.distributed.further_cases import DRAWN, drawn_name

INPUTS = {"projector": SIZES["--hidden-size"], "router": SIZES["--moe-router-rnn-hidden-size"]}


def routing_weights(lab, router: str, layout: str) -> list[dict[str, torch.Tensor]]:
    """Of every rank, by names that do not depend on the layout."""
    results = lab.results[drawn_name(router, layout)]
    return [{name: w for name, w in rank["weights"].items() if ".mlp.router." in name} for rank in results]


@pytest.mark.parametrize("router", DRAWN)
def test_bounds(lab, router):
    (weights,) = routing_weights(lab, router, "1 process")
    assert len(weights) == 4 * (4 if router == "gru" else 1)
    for name, weight in weights.items():
        kind = name.rpartition(".")[2].removesuffix("_bias")
        bound = 1 / math.sqrt(INPUTS.get(kind, SIZES["--hidden-size"]))
        assert 0.5 * bound < weight.abs().max() <= bound, name


@pytest.mark.parametrize("router", DRAWN)
@pytest.mark.parametrize("layout", ["TP2 SP", "EP2 alltoall"])
def test_ranks_of_a_layer_draw_the_same(lab, router, layout):
    """With expert parallelism what one process draws; tensor-parallel ranks draw smaller parts of other matrices."""
    (expected,) = routing_weights(lab, router, "1 process")
    first, second = routing_weights(lab, router, layout)
    assert first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(first[name], second[name]) for name in expected)
    if layout == "EP2 alltoall":
        assert all(torch.equal(first[name], expected[name]) for name in expected)


@pytest.mark.parametrize("router", DRAWN)
def test_stages_draw_from_seeds_of_their_own(lab, router):
    """As everything in Megatron: the first stage what one process draws for these layers, the second other numbers."""
    (expected,) = routing_weights(lab, router, "1 process")
    first, second = routing_weights(lab, router, "PP2")
    assert first.keys() | second.keys() == expected.keys() and not first.keys() & second.keys()
    assert all(torch.equal(first[name], expected[name]) for name in first)
    assert not any(torch.equal(second[name], expected[name]) for name in second)
