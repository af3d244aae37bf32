"""gloo in the place of NCCL.

gloo of torch 2.11 has nearly all collectives that Megatron uses (reduce_scatter_tensor, averages, uneven all-to-all,
coalescing, bf16), so only names, lifetimes and uneven gathering need care.
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


def _uneven_all_gather(function: Callable) -> Callable:
    """Wrap all_gather for tensors of different lengths, which NCCL takes and gloo does not.

    Experts that are split over tensor ranks gather as many tokens as each rank was sent (mappings.py:154).
    """

    @functools.wraps(function)
    def wrapper(tensor_list, tensor, group=None, async_op=False):
        lengths = [len(part) if part.dim() else 1 for part in tensor_list]
        if len(set(lengths)) == 1:
            return function(tensor_list, tensor, group, async_op)
        padded = [tensor.new_empty(max(lengths), *tensor.shape[1:]) for _ in lengths]
        function(padded, _padded(tensor, max(lengths)), group)
        for part, result, length in zip(tensor_list, padded, lengths, strict=True):
            part.copy_(result[:length])
        return _Done() if async_op else None

    return wrapper


def _uneven_reduce_scatter(function: Callable) -> Callable:
    """Wrap reduce_scatter likewise: it is the backward pass of the above (mappings.py:198)."""

    @functools.wraps(function)
    def wrapper(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        longest = max(len(part) for part in input_list)
        result = output.new_empty(longest, *output.shape[1:])
        c10d.reduce_scatter_tensor(result, torch.cat([_padded(part, longest) for part in input_list]), op, group)
        output.copy_(result[: len(output)])
        return _Done() if async_op else None

    return wrapper


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])))


def install() -> None:
    """Apply everything above."""
    for name, uneven in (("all_gather", _uneven_all_gather), ("reduce_scatter", _uneven_reduce_scatter)):
        wrapper = uneven(getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(dist, name, wrapper)
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
