"""Skipped, with the reason, where MegaBlocks is not installed, as its own tests are."""

from tests.megablocks import conftest

if hasattr(conftest, "pytest_pycollect_makemodule"):
    pytest_pycollect_makemodule = conftest.pytest_pycollect_makemodule
