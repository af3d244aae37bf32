"""Blocks of layers that share projector and head across pipeline stages train as in one process."""

import pytest
import torch

from tests.distributed import further_cases, sharing_cases
from tests.distributed.arguments import ITERATIONS
from tests.distributed.test_gradients import largest_error
from tests.distributed.test_layouts import shared_weights

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def shared_lab(lab):
    """The lab with every second half run; most are."""
    lab.run(sharing_cases.second_halves())
    return lab


def test_stages_train_as_one_process(shared_lab):
    assert len(shared_lab.results["shared, in stages"][0]["loss"]) == ITERATIONS
    assert shared_lab.deviation("shared, in stages", sharing_cases.REFERENCE) < TOLERANCE


def test_gradients_of_what_is_shared_are_one_processs(shared_lab):
    """Element by element: those of the four of the cell, and of two projectors and two heads with biases."""
    worst, names = largest_error(shared_lab, "shared, in stages", sharing_cases.REFERENCE)
    assert len(names) == 4 + 2 * 2 * 2
    assert worst < 1e-5


def test_copies_stay_identical(shared_lab):
    first, second = shared_weights(shared_lab, "shared, in stages")
    assert len(first) == 12 and all(torch.equal(first[key], second[key]) for key in first)


def test_a_projector_that_is_not_synced_is_noticed(shared_lab):
    name = f"fault: {sharing_cases.FAULT}"
    assert shared_lab.deviation(name, sharing_cases.REFERENCE) > 10 * TOLERANCE
    assert largest_error(shared_lab, name, sharing_cases.REFERENCE)[0] > 1e-3
    first, second = shared_weights(shared_lab, name)
    differ = {key for key in first if not torch.equal(first[key], second[key])}
    assert differ >= {f"rnn_router.cell.projectors.{block}.{kind}" for block in (0, 1) for kind in ("weight", "bias")}


def test_bf16_gradients_are_summed_in_fp32(shared_lab):
    """Those of a layer that another stage holds, too: autograd would add them up in bf16."""
    (one,), stages = shared_lab.results["shared bf16 1 process"], shared_lab.results["shared bf16 PP2 VPP2"]
    names = set()
    for stage in stages:
        assert stage["loss"] == one["loss"]
        for name, gradient in stage["gradients"].items():
            expected = one["gradients"][name]
            if name.startswith("rnn_router."):
                names.add(name)
                assert (gradient - expected).norm() <= 1e-6 * expected.norm() and expected.norm() > 0
    assert len(names) == 12


@pytest.mark.parametrize("case", sharing_cases.second_halves(), ids=lambda case: case.name)
def test_a_restart_continues_the_trajectory(shared_lab, case):
    assert len(shared_lab.results[case.name][0]["loss"]) == ITERATIONS - further_cases.HALF
    assert shared_lab.deviation(case.name, case.reference, first=further_cases.HALF) < TOLERANCE
