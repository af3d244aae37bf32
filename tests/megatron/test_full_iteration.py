"""--cuda-graph-impl full_iteration, as far as no GPU allows: nothing of ours reads on the host inside what is captured,
and a replay of the recorded operations trains as the loop does (tests/megatron/full_iteration.py, one process).

RMOE_TEST_ALL_CELLS=1 adds fp32, and the fault that the routing's measures would have without what turns it off.
"""

import json

import pytest

from tests import forked
from tests.distributed.arguments import ALL_CELLS
from tests.megatron.full_iteration import ITERATIONS, LOGGED

DTYPES = [" bf16", ""] if ALL_CELLS else [" bf16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("runs")
    with forked.ranks("tests.megatron.full_iteration:main", (str(folder),), 1, folder / "log") as processes:
        assert forked.end(processes, 300) == [0], (folder / "log").read_text()[-5000:]
    return json.loads((folder / "found.json").read_text())


def reads(run: dict, captured: bool) -> dict[int, set[str]]:
    """{iteration: the places of this package that read on the host}."""
    found = {}
    for iteration, where, inside in run["reads"]:
        if iteration and inside is captured:
            found.setdefault(iteration, set()).add(where)
    return found


def test_nothing_is_read_inside_forward_and_backward(runs):
    assert [reads(run, captured=True) for name, run in runs.items() if name.startswith("plain")] == [{}] * len(DTYPES)


def test_outside_an_iteration_that_is_not_logged_reads_its_loss_alone(runs):
    """metrics.jsonl has a line an iteration; the optimizer has read the gradient's norm by then, which is later."""
    found = reads(runs["plain bf16"], captured=False)
    plain = {"reporting.py:_losses"}
    logged = {1, LOGGED}
    assert {i: places for i, places in found.items() if i not in logged} == {
        i: plain for i in range(1, ITERATIONS + 1) if i not in logged
    }
    assert all("health.py:report" in found[i] for i in logged)


def test_a_planted_read_is_seen(runs):
    both = {"router.py:gating", "gru_arithmetic.py:backward"}
    assert reads(runs["planted"], captured=True) == {1: both}


def test_our_check_of_what_is_finite_reads_there(runs):
    """Which is why Megatron's --no-check-for-nan-in-loss-and-grad, that a full graph asks for, switches ours off."""
    assert reads(runs["checked"], captured=True) == {1: {"nonfinite.py:_check"}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_train_as_the_loop_does(runs, dtype):
    """Captured in the second iteration, repeated in all others: gradients of the shared cell, which bypass autograd in
    bf16, the balancing loss, the state from layer to layer."""
    plain, graph = runs["plain" + dtype], runs["graph" + dtype]
    assert graph["replays"] == ITERATIONS - 1 and len(set(plain["losses"])) == ITERATIONS
    assert graph["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert graph["norms"] == pytest.approx(plain["norms"], rel=1e-6)


def test_replays_measure_the_routing(runs):
    """Measured in every iteration, where the loop would ask only in those that it logs: asked once, while it is
    captured, it would say no for ever."""
    assert len(runs["graph bf16"]["health"]["router_entropy"]) == 4
    if ALL_CELLS:
        assert runs["measured when captured"]["health"]["router_entropy"] == []
