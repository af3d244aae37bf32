"""Shared by all tests: CPU mode first, so that any test may import Megatron; one thread a process."""

import pytest
import torch

import rmoe_megablocks.megatron  # noqa: F401  makes Megatron run without a GPU before anything imports it
from rmoe_megablocks.compat import megatron_cpu

from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # isort: skip  after CPU mode

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_metrics_of_another_model():
    """Megatron keeps one tracker a process, sized by the first model that reports to it."""
    yield
    destroy_moe_metrics_tracker()


def pytest_collection_modifyitems(items):
    if not megatron_cpu.needed():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
