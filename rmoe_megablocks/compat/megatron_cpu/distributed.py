"""gloo in the place of NCCL.

gloo of torch 2.11 has all the collectives that Megatron uses (reduce_scatter_tensor, averages, uneven all-to-all,
coalescing, bf16), so only names and lifetimes need care.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

# Requests of isend and irecv that nobody waited on yet, with the memory that gloo reads from or writes to.
_in_flight: list[tuple[Any, torch.Tensor]] = []


def _on_gloo(function: Callable) -> Callable:
    """Wrap a function that makes process groups: NCCL and what configures it cannot be used on the CPU."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args = tuple("gloo" if _is_nccl(value) else value for value in args)
        if _is_nccl(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        # Options of communicators are NCCL's (parallel_state.py:181); a device id asks for an eager connection.
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return function(*args, **kwargs)

    return wrapper


def _is_nccl(backend: Any) -> bool:
    return isinstance(backend, str) and "nccl" in backend.lower()


def _keeping_memory(function: Callable) -> Callable:
    """Wrap isend or irecv so that the memory outlives the request.

    After the schedules start a send they shrink the tensor that was sent, by giving it another storage
    (schedules.py:166, deallocate_output_tensor). On a GPU the stream orders that after the send; gloo is still reading
    from memory that was freed. A second tensor on the same storage keeps it.
    """

    @functools.wraps(function)
    def wrapper(tensor, *args, **kwargs):
        alias = tensor.detach()
        request = function(alias, *args, **kwargs)
        _in_flight[:] = [entry for entry in _in_flight if not entry[0].is_completed()]
        if request is not None:
            _in_flight.append((request, alias))
        return request

    return wrapper


class _Done:
    """The handle of an operation that was waited for already."""

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: Any = None) -> bool:
        return True


def _waiting(function: Callable) -> Callable:
    """Wrap a collective so that it is over when it returns, even with ``async_op``."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        request = function(*args, **kwargs)
        # Inside a coalescing manager the result is a placeholder that must not be touched.
        if isinstance(request, dist.Work) and not isinstance(request, c10d._IllegalWork):
            request.wait()
            return _Done()
        return request

    return wrapper


def _wait_for_collectives() -> None:
    # With an interleaved pipeline, the distributed optimizer and both overlaps (param_and_grad_buffer.py:712), gloo ran
    # collectives in its threads while the main thread sent and received, and the heap was corrupted now and then. The
    # cause was not found, but the crashes were not seen again without the overlap, which gains nothing on a CPU.
    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single"):
        wrapper = _waiting(getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(dist, name, wrapper)
    # What a coalescing manager holds is started when its block ends, past the functions above.
    c10d._CoalescingManager.append = lambda self, work=None: work and work.wait()


def install() -> None:
    """Apply everything above."""
    _wait_for_collectives()
    # Both modules: torch looks its own functions up in distributed_c10d, everybody else in torch.distributed.
    # batch_isend_irecv compares functions by identity, so both have to hold the same ones.
    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration"):
        wrapper = _on_gloo(getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(dist, name, wrapper)
    for name in ("isend", "irecv"):
        wrapper = _keeping_memory(getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(dist, name, wrapper)
