"""Test modules of an extra, skipped with the reason where one of its packages is not installed."""

import importlib.util
from collections.abc import Callable

import pytest


def skipped_without(extra: str, *packages: str) -> Callable:
    """The hook ``pytest_pycollect_makemodule`` of a conftest.py: a module whose imports would fail is not imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]

    class Skipped(pytest.Module):
        def collect(self):
            pytest.skip(f"{missing[0]} is not installed (pip install -e '.[{extra}]')")

    def pytest_pycollect_makemodule(module_path, parent):
        return Skipped.from_parent(parent, path=module_path) if missing else None

    return pytest_pycollect_makemodule
