"""Skipped, with the reason, where one of the extra's packages is not installed."""

import importlib.util

import pytest

_MISSING = [name for name in ("transformers", "lm_eval", "datasets") if importlib.util.find_spec(name) is None]

if _MISSING:

    class _Skipped(pytest.Module):
        """Stands for a test module whose imports would fail."""

        def collect(self):
            pytest.skip(f"{_MISSING[0]} is not installed (pip install -e '.[eval]')")

    def pytest_pycollect_makemodule(module_path, parent):
        return _Skipped.from_parent(parent, path=module_path)
