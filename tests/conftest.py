"""Shared by all tests: CPU mode first, so that any test may import Megatron; one thread a process."""

import pytest
import torch

import rmoe_megablocks.megatron  # noqa: F401  makes Megatron run without a GPU before anything imports it
from rmoe_megablocks.compat import megatron_cpu

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not megatron_cpu.needed():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
