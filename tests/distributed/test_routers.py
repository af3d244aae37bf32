"""Every router type and modifier of the registry: layouts, restarts, resharding, frozen weights and planted faults.

With RMOE_TEST_ALL_CELLS=1 only the routers that are asked for are run: ``-k eda`` runs eda's cells.
"""

import pytest
import torch

from tests.distributed import router_cases
from tests.distributed.arguments import ITERATIONS
from tests.distributed.grid import router_shape
from tests.distributed.lab import START
from tests.distributed.router_cases import HALF, LATE, ONE_PROCESS_LAST, RESUMED, TOLERANCE, case_name, is_run
from tests.distributed.routers import ROUTERS

COLUMNS = {name: router_cases.columns(router) for name, router in ROUTERS.items()}


def having(columns, only_frozen: bool = False) -> pytest.MarkDecorator:
    """Parametrises over routers and those of ``columns`` that they have in this test run."""
    routers = [name for name, router in ROUTERS.items() if router.frozen or not only_frozen]
    pairs = [(router, column) for router in routers for column in columns if column in COLUMNS[router]]
    chosen = [pytest.param(*pair, id=" @ ".join(reversed(pair))) for pair in pairs if is_run(*pair)]
    return pytest.mark.parametrize(("router", "column"), chosen)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_in_the_table(router):
    """So is a type that is registered tomorrow, without being named here."""
    missing = {*router_cases.CELLS, *router_cases.RESUMPTIONS} - COLUMNS[router].keys()
    assert missing == (set() if ROUTERS[router].shares else {router_cases.OVERLAPPED_STAGES})


def test_types_with_a_state_are_always_trained_on_two_stages():
    always = {name for name in ROUTERS if router_cases.is_always_run(name, "PP2")}
    assert always >= {"gru", "rnn", "lstm", "eda", "omni", "hyper", "random"}


@having(router_cases.CELLS)
def test_trains_as_one_process(router_lab, router, column):
    assert len(router_lab.results[case_name(router, column)][0]["loss"]) == ITERATIONS
    deviation = router_lab.deviation(case_name(router, column), router_cases.reference(router, column).name)
    print(f"deviation {deviation:.1e}")
    assert deviation < TOLERANCE


@having([RESUMED])
def test_resumes_bit_for_bit(router_lab, router, column):
    straight, resumed = (router_lab.results[case_name(router, name)][0] for name in ("PP2", column))
    assert len(resumed["loss"]) == ITERATIONS - HALF
    assert resumed["loss"] == straight["loss"][HALF:] and resumed["grad_norm"] == straight["grad_norm"][HALF:]


@having(router_cases.RESUMPTIONS)
def test_goes_on_in_another_layout(router_lab, router, column):
    first = LATE if column == ONE_PROCESS_LAST else HALF
    deviation = router_lab.deviation(case_name(router, column), case_name(router, "1 process"), first)
    print(f"deviation {deviation:.1e}")
    assert deviation < TOLERANCE


@having(router_cases.FAULTS)
def test_a_fault_is_noticed(router_lab, router, column):
    """Ten times the tolerance at least."""
    deviation = router_lab.deviation(case_name(router, column), case_name(router, "1 process"))
    print(f"deviation {deviation:.1e}")
    assert deviation > 10 * TOLERANCE


def changed(lab, router: str, case: str) -> set[str]:
    """Frozen weights that are not bit for bit what the run started from."""
    start = lab.results[START + router_shape(router)][0]["weights"]
    found, names = set(), set(ROUTERS[router].frozen)
    held = [(name, weight) for rank in lab.results[case] for name, weight in rank["weights"].items() if name in names]
    assert {name for name, _ in held} == names
    for name, weight in held:
        expected = start[name]
        assert expected.dtype == torch.float32 and expected.std() > 0
        if not torch.equal(weight, expected.to(weight.dtype)):
            found.add(name)
    return found


@having([*router_cases.CELLS, *router_cases.RESUMPTIONS, *router_cases.FROZEN], only_frozen=True)
def test_frozen_weights_stay_as_drawn(router_lab, router, column):
    for case in COLUMNS[router][column]:
        assert changed(router_lab, router, case.name) == set()
        weights = router_lab.results[case.name][0]["weights"]
        assert weights[ROUTERS[router].frozen[0]].dtype == (torch.bfloat16 if "bf16" in column else torch.float32)


@having(["frozen weights trained"])
def test_frozen_weights_that_are_trained_are_noticed(router_lab, router, column):
    assert changed(router_lab, router, case_name(router, column)) == set(ROUTERS[router].frozen)


@having(router_cases.FROZEN)
def test_resumes_bit_for_bit_beside_frozen_weights(router_lab, router, column):
    straight, resumed = (router_lab.results[case.name][0] for case in COLUMNS[router][column])
    assert len(resumed["loss"]) == ITERATIONS - HALF
    assert resumed["loss"] == straight["loss"][HALF:] and resumed["grad_norm"] == straight["grad_norm"][HALF:]
