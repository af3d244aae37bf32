"""The processes that load a rank's data: what Megatron makes of SIGTERM in them, and what ends them instead."""

import os
import signal

from megatron.training.datasets import data_samplers

from rmoe_megablocks.process import serve_parent


class _LivesWithItsRank:
    """In the place of Megatron's handler, which notes SIGTERM in a process where nobody asks for it."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number

    def __enter__(self) -> "_LivesWithItsRank":
        signal.signal(self._number, signal.SIG_IGN)
        serve_parent(os.getppid())
        return self


def end_loaders_with_their_rank() -> None:
    """The workers of a data loader end at once when their rank does, and not before.

    With --exit-signal-handler they survive SIGTERM (data_samplers.py:95), as a rank that saves needs them. Yet SIGTERM
    is what a rank that ends by an error sends them, to wait for their end, for ever; after a kill they look for their
    rank every 5 seconds. ``DistributedSignalHandler`` is looked up when called, and only there in that module.
    """
    data_samplers.DistributedSignalHandler = _LivesWithItsRank
