"""Counts what pipeline stages send each other."""

import contextlib
from unittest import mock

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


@contextlib.contextmanager
def counted(wanted: bool):
    """Yields {"messages", "bytes"} sent by this process through Megatron's communicator while the context is open."""
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

    with mock.patch.object(P2PCommunicator, "_communicate", communicate):
        yield counts
