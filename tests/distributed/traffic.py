"""Counts what processes send each other."""

import contextlib
from unittest import mock

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Records (operation, ranks of its group, bytes) of all-reduces, all-gathers, reduce-scatters and all-to-alls.

    Bytes are those of the whole: what is reduced, gathered or scattered on one rank; of an all-to-all what leaves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].removesuffix("_").strip("_").removesuffix("_coalesced")
        if function.namespace == "c10d" and name in _WHOLE:
            group = torch.distributed.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
            ranks = tuple(torch.distributed.get_process_group_ranks(group))
            self.found.append((name, ranks, _WHOLE[name](args, ranks)))
        return function(*args, **(kwargs or {}))


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))


def _leaving(args, ranks) -> int:
    sent, splits, own = args[1], args[4], ranks.index(torch.distributed.get_rank())
    splits = splits or [len(sent) // len(ranks)] * len(ranks)
    row = _bytes(sent) // max(1, len(sent))
    return row * (sum(splits) - splits[own])


#: bytes of the whole, from an operation's arguments
_WHOLE = {
    "allreduce": lambda args, ranks: _bytes(args[0]),
    "allgather_base": lambda args, ranks: _bytes(args[0]),
    "allgather_into_tensor": lambda args, ranks: _bytes(args[0]),
    "reduce_scatter_base": lambda args, ranks: _bytes(args[1]),
    "reduce_scatter_tensor": lambda args, ranks: _bytes(args[1]),
    "alltoall_base": _leaving,
}


@contextlib.contextmanager
def counted(wanted: bool):
    """Yields what this process sends while the context is open: "messages" and "bytes" of Megatron's communicator
    between stages, "collectives" of :class:`Collectives`.
    """
    counts = {"messages": 0, "bytes": 0}
    if not wanted:
        yield counts
        return
    original = P2PCommunicator._communicate

    def communicate(self, *, tensor_send_next, tensor_send_prev, **kwargs):
        for tensor in (tensor_send_next, tensor_send_prev):
            if tensor is not None:
                counts["messages"] += 1
                counts["bytes"] += tensor.numel() * tensor.element_size()
        return original(self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **kwargs)

    with mock.patch.object(P2PCommunicator, "_communicate", communicate), Collectives() as collectives:
        counts["collectives"] = collectives.found
        yield counts
