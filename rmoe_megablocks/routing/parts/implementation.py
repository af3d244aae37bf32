"""With which operations a recurrent router computes: its argument, and what ``auto`` means on a device."""

from __future__ import annotations

import functools
import logging

import torch

from rmoe_megablocks.kernels import why_not_triton
from rmoe_megablocks.routing.arguments import Argument

AUTO, TRITON, EAGER, RECOMPUTE = CHOICES = ("auto", "triton", "eager", "recompute")
IMPL = Argument(
    "--moe-router-impl",
    EAGER,
    "With what the GRU is computed: eager, torch's operations; recompute, the same in a third of the memory, with two "
    "products more in the backward pass; triton, kernels for CUDA GPUs, which none has run yet; auto, triton where it "
    "can be, otherwise eager.",
    choices=CHOICES,
    kept=False,
)
_logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def chosen(
    impl: str, device: torch.device, dtype: torch.dtype, parameters: torch.dtype, size: int, experts: int
) -> str:
    """``impl`` with auto decided, for a state of ``size`` in ``dtype`` and parameters of another; says so once.

    Raises:
        ValueError: triton was asked for, and does not take these.
    """
    return _chosen(impl, device.type, device.index, dtype, parameters, size, experts)


@functools.cache
def _chosen(
    impl: str,
    device_type: str,
    index: int | None,
    dtype: torch.dtype,
    parameters: torch.dtype,
    size: int,
    experts: int,
) -> str:
    if impl not in (AUTO, TRITON):
        return impl
    reason = why_not_triton(torch.device(device_type, index), dtype, parameters, size, experts)
    if impl == TRITON and reason is not None:
        raise ValueError(f"{IMPL.option} triton: {reason}; use {AUTO}")
    found = TRITON if reason is None else EAGER
    if impl == AUTO and device_type != "meta" and _is_first_rank():
        # on a GPU everybody wants to know; without one there is nothing to choose from
        level = logging.WARNING if device_type == "cuda" else logging.INFO
        _logger.log(level, "rmoe: the router is computed by %s%s", found, f": {reason}" if reason else "")
    return found


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
