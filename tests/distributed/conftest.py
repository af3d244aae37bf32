"""One lab for all tests of this folder."""

import pytest

from tests.distributed import further_cases
from tests.distributed.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """All cases of the tables, run."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.run(further_cases.everything())
    return lab
