"""Every case of cases/, one test each; see the package's docstring."""

import pytest

from tests.odd_inputs.run import all_cases, run

CASES = all_cases()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{part}: {case.name}") for part, cases in CASES.items() for case in cases]
)
def test_ends_as_it_should(case, tmp_path):
    case.check(run(case, tmp_path / "case"))


def test_there_are_enough_of_them():
    assert sum(map(len, CASES.values())) >= 120
