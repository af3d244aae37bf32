"""Tests of MegaBlocks: skipped, with the reason, where it is not installed."""

import importlib.util

import pytest

if importlib.util.find_spec("megablocks") is None:
    REASON = "MegaBlocks is not installed (rmoe install megablocks)"

    class _Skipped(pytest.Module):
        """Stands for a test module whose imports would fail."""

        def collect(self):
            pytest.skip(REASON)

    def pytest_pycollect_makemodule(module_path, parent):
        if module_path.name not in ("test_install.py", "test_patches.py"):
            return _Skipped.from_parent(parent, path=module_path)
