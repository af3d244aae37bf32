"""Shared by all tests: CPU mode first, so that any test may import Megatron; one thread a process."""

import pytest
import torch

import rmoe_megablocks.megatron  # noqa: F401  makes Megatron run without a GPU before anything imports it
from rmoe_megablocks.compat import megatron_cpu

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # isort: skip  after CPU mode
from tests.docstrings import parse_docstrings_once  # isort: skip

torch.set_num_threads(1)
parse_docstrings_once()


@pytest.fixture(autouse=True)
def no_metrics_of_another_model():
    """Megatron keeps one tracker a process, sized by the first model that reports to it."""
    yield
    destroy_moe_metrics_tracker()


_LONGEST = ("tests/distributed/", "tests/test_end_to_end.py")  # started first where tests run side by side


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With pytest-xdist a file stays in one process for its fixtures' sake, and tests/distributed for its lab.

    But with --dist worksteal, which tests/gpu.sh has for the many cases of one file.
    """
    if config.getoption("dist") == "worksteal":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFixtures(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _LONGEST[0] if nodeid.startswith(_LONGEST[0]) else super()._split_scope(nodeid)

    return ByFixtures(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))
    if not megatron_cpu.needed():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_make_parametrize_id(val):
    """Compressed data carries the time: a test must be called the same in every process that collects it."""
    return "bytes" if isinstance(val, bytes) and len(val) > 8 else None
