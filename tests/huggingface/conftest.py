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


def pytest_configure(config):
    """Markers of transformers' common tests, which test_upstream.py runs where it is asked to."""
    kinds = ("expert_parallel", "fsdp", "pipeline", "staging", "tensor_parallel", "training", "agent")
    flash = ("flash_attn", "flash_attn_3", "flash_attn_4", "all_flash_attn", "torch_compile", "torch_export")
    names = ["accelerate_tests", "generate", "order", "slow", *(f"is_{kind}_test" for kind in kinds)]
    for name in [*names, *(f"{kind}_test" for kind in flash)]:
        config.addinivalue_line("markers", f"{name}: of transformers")
