"""One lab for all tests of this folder."""

import pytest

from tests.distributed import further_cases, router_cases, sharing_cases
from tests.distributed.arguments import ALL_CELLS
from tests.distributed.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """All cases of the tables, run."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.run([*further_cases.everything(), *sharing_cases.everything()])
    return lab


@pytest.fixture(scope="session")
def router_lab(request, tmp_path_factory) -> Lab:
    """The lab with the cases of routers run: of those that the session's tests name, when all cells are run."""
    if not ALL_CELLS:
        return request.getfixturevalue("lab")
    lab = Lab(tmp_path_factory.mktemp("routers"))
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for cases in router_cases.everything({call["router"] for call in calls if {"router", "column"} <= call.keys()}):
        lab.run(cases)
    return lab
