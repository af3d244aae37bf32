"""Tests of the transformers model: skipped, with the reason, where transformers is not installed."""

import importlib.util

import pytest

if importlib.util.find_spec("transformers") is None:

    class _Skipped(pytest.Module):
        """Stands for a test module whose imports would fail."""

        def collect(self):
            pytest.skip("transformers is not installed (pip install -e '.[hf]')")

    def pytest_pycollect_makemodule(module_path, parent):
        return _Skipped.from_parent(parent, path=module_path)
