"""Skipped, with the reason, where transformers is not installed."""

from tests.huggingface import conftest as theirs

if hasattr(theirs, "pytest_pycollect_makemodule"):
    pytest_pycollect_makemodule = theirs.pytest_pycollect_makemodule
