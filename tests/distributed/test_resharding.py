"""A run saved in one layout and resumed in another continues the trajectory of one process."""

import pytest

from tests.distributed import further_cases
from tests.distributed.arguments import ITERATIONS


@pytest.fixture(scope="module")
def resumed(lab):
    """The lab with every route's second half run; most are."""
    lab.run(further_cases.second_halves())
    return lab


@pytest.mark.parametrize("case", further_cases.second_halves(), ids=lambda case: case.name)
def test_a_route_continues_the_trajectory(resumed, case):
    assert len(resumed.results[case.name][0]["loss"]) == ITERATIONS - further_cases.HALF
    assert resumed.deviation(case.name, case.reference, first=further_cases.HALF) < 5e-6


@pytest.mark.parametrize("case", further_cases.first_halves(), ids=lambda case: case.name)
def test_first_halves_save_what_they_trained(resumed, case):
    assert resumed.results[case.name][0]["exit"] is None or resumed.results[case.name][0]["exit"] == 0
    assert len(resumed.results[case.name][0]["loss"]) == further_cases.HALF


def test_ranks_that_chose_another_checkpoint_stop_together(lab):
    for rank in lab.results["ranks that chose differently"]:
        assert "rank 0 would start from iteration 1, rank 1 from 7: the folder must be the same" in rank["refused"]
