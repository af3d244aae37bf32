"""The schedule against Megatron's own order, closed forms and small cases by hand."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from rmoe_megablocks.planning.scale.pipeline import BACKWARD, FORWARD, makespan, order

F, B = 2.0, 3.0


def uniform(pipeline, virtual=1):
    return [[F] * virtual] * pipeline, [[B] * virtual] * pipeline


@pytest.mark.parametrize(("pipeline", "microbatches"), [(1, 4), (2, 1), (2, 8), (4, 4), (4, 3), (8, 32)])
def test_1f1b_takes_what_the_closed_form_says(pipeline, microbatches):
    assert makespan(*uniform(pipeline), microbatches) == pytest.approx((microbatches + pipeline - 1) * (F + B))


INTERLEAVED = [(2, 2, 2), (2, 3, 8), (4, 2, 4), (4, 2, 16), (8, 3, 16)]  # pipeline, virtual, micro-batches


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), INTERLEAVED)
def test_interleaving_divides_the_bubble(pipeline, virtual, microbatches):
    expected = (microbatches * virtual + pipeline - 1) * (F + B)
    assert makespan(*uniform(pipeline, virtual), microbatches) == pytest.approx(expected)


def test_messages_of_one_microbatch_go_there_and_back():
    assert makespan(*uniform(3), 1, message=0.25) == pytest.approx(3 * (F + B) + 4 * 0.25)


def test_messages_by_hand():
    """Two stages, two micro-batches, c 1. Rank 0: F0 0-2, F1 2-4. Rank 1: F0 3-5, B0 5-8, F1 8-10, B1 10-13. Rank 0:
    B0 9-12, B1 14-17."""
    assert makespan(*uniform(2), 2, message=1.0) == 17


def test_the_slowest_stage_decides():
    forward, backward = [[F], [2 * F], [F]], [[B], [2 * B], [B]]
    found = makespan(forward, backward, 50) - 50 * 2 * (F + B)
    assert F + B <= found <= 2 * (F + B) + F, "the others work while it does, but for the first and last passes"


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), INTERLEAVED)
def test_the_order_is_megatrons(pipeline, virtual, microbatches):
    table = get_schedule_table(microbatches, virtual, pipeline)
    for rank in range(pipeline):
        ours = order(pipeline, virtual, microbatches, rank)
        of_kind = {kind: [(w.microbatch, w.chunk) for w in ours if w.kind == kind] for kind in (FORWARD, BACKWARD)}
        assert of_kind[FORWARD] == table
        assert of_kind[BACKWARD] == [(microbatch, virtual - 1 - chunk) for microbatch, chunk in table]
        first = next(i for i, work in enumerate(ours) if work.kind == BACKWARD)
        # its warm-up, and the forward pass of the first pair
        warm_up = min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline, microbatches * virtual)
        assert first == min(warm_up + 1, microbatches * virtual)


def test_odd_interleaving_is_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        order(4, 2, 6, 0)
