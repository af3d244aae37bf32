"""Every layout trains the model that one process trains, and a fault in the threading of the state is noticed.

Losses and gradient norms of every iteration are compared, from one checkpoint that one process wrote; see cases.py.
"""

import pytest
import torch

from tests.distributed import cases, further_cases, grid
from tests.distributed.arguments import ITERATIONS, OPTIONS, SIZES

COMPARED = {case.name: case for case in cases.selected()}


def tolerance(case: cases.Case) -> float:
    _, _, mode = case.name.partition(" @ ")
    return 2e-6 if mode.startswith("null experts") else grid.TOLERANCE.get(mode, 5e-6)


@pytest.mark.parametrize("name", COMPARED)
def test_trains_as_one_process(lab, name):
    case = COMPARED[name]
    assert len(lab.results[name][0]["loss"]) == ITERATIONS
    assert lab.deviation(name, case.reference) < tolerance(case)


@pytest.mark.parametrize("case", further_cases.recomputed_noise(), ids=lambda case: case.name)
def test_recompute_draws_the_same_random_numbers(lab, case):
    assert lab.deviation(case.name, case.reference) < 5e-6  # gradients are added up in another order


def test_random_numbers_matter(lab):
    """The comparison above must be able to fail."""
    assert lab.deviation("fault: random state not restored", "1 process @ dropout") > 1e-3
    assert lab.deviation("1 process @ dropout", "base @ fp32") > 1e-3
    assert lab.deviation("1 process @ input jitter", "base @ fp32") > 1e-3


@pytest.mark.parametrize("fault", further_cases.FAULTS)
def test_a_fault_is_noticed(lab, fault):
    """Ten times the tolerance at least."""
    assert lab.deviation(f"fault: {fault}", "base @ fp32") > 5e-5


def shared_weights(lab, name: str) -> list[dict]:
    copies = [{k: v for k, v in rank["weights"].items() if k.startswith("rnn_router.")} for rank in lab.results[name]]
    return [copy for copy in copies if copy]


@pytest.mark.parametrize(
    "name",
    ["PP2 @ fp32", "PP2 VPP2 @ fp32", "PP4 VPP2 @ fp32", "PP2 VPP2 DP2 distributed optimizer, overlaps @ fp32"],
)
def test_copies_of_the_shared_recurrence_stay_identical(lab, name):
    first, *others = shared_weights(lab, name)
    assert len(first) == 4 and others
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_missing_gradient_sync_lets_the_copies_drift(lab):
    first, second = shared_weights(lab, "fault: no gradient sync over stages")
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_bf16_stages_compute_what_one_process_computes(lab):
    (one,), stages = lab.results["states bf16 1 process"], lab.results["states bf16 PP2"]
    assert stages[0]["loss"] == one["loss"]
    layers = {}
    for stage in stages:
        layers |= stage["states"]
    assert sorted(layers) == sorted(one["states"]) == [1, 2, 3, 4]
    for layer, states in layers.items():
        assert len(states) == 2  # micro-batches
        for ours, theirs in zip(states, one["states"][layer], strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    names = set()
    for stage in stages:
        for name, gradient in stage["gradients"].items():
            names.add(name)
            expected = one["gradients"][name]
            if name.startswith("rnn_router."):
                assert (gradient - expected).norm() <= 1e-6 * expected.norm()
            else:
                assert torch.equal(gradient, expected), name
            # other draws of RMOE_TEST_OPTIONS may leave an expert without a token
            assert expected.abs().sum() > 0 or OPTIONS, name
    assert names == set(one["gradients"])


@pytest.mark.parametrize("schedule", ["PP2", "PP2 VPP2"])
def test_the_state_adds_bytes_but_no_message(lab, schedule):
    ranks = (lab.results[f"traffic {schedule}"], lab.results[f"traffic {schedule} linear"])
    for ours, linear in zip(*ranks, strict=True):
        hidden, state = SIZES["--hidden-size"], SIZES["--moe-router-rnn-hidden-size"]
        assert ours["traffic"]["messages"] == linear["traffic"]["messages"] > 0
        assert ours["traffic"]["bytes"] * hidden == linear["traffic"]["bytes"] * (hidden + state)


def test_an_fp32_state_takes_two_bf16_columns(lab):
    for full, half in zip(lab.results["traffic PP2"], lab.results["traffic PP2 bf16"], strict=True):
        hidden, state = SIZES["--hidden-size"], SIZES["--moe-router-rnn-hidden-size"]
        assert half["traffic"]["messages"] == full["traffic"]["messages"]
        assert half["traffic"]["bytes"] * 4 * (hidden + state) == full["traffic"]["bytes"] * 2 * (hidden + 2 * state)
