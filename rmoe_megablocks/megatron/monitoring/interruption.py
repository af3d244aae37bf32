"""Ending work that comes after the training: there is nothing to save, so a signal ends it at once."""

import signal

import torch
from megatron.training import get_args
from megatron.training.global_vars import get_signal_handler


class Interrupted(Exception):
    """The work ended before it was done; the text says why. Raised by every rank in the same place.

    Attributes:
        mean: of what was done, None if that is nothing.
        done: how much that is.
    """

    mean: float | None = None
    done: int = 0


class Interruption:
    """While it is open, Ctrl-C, SIGTERM and --exit-signal are noted; the work asks :meth:`check` for them.

    Megatron's own handler of SIGTERM, which nobody asks once the training is over, is put aside. What it noted before
    counts: a signal during the last checkpoint. Collective to open.
    """

    def __enter__(self) -> "Interruption":
        args = get_args()
        self._received = args.exit_signal_handler and any(get_signal_handler().signals_received())
        self._alone = False
        numbers = {signal.SIGINT, signal.SIGTERM, args.exit_signal}
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self._received = True
        if self._alone:
            raise Interrupted("by a signal")

    def check(self, number: float = 0.0) -> float:
        """The largest ``number`` of all ranks. Collective. Raises Interrupted on all if one has had a signal."""
        votes = torch.tensor([float(self._received), number], dtype=torch.float64, device="cuda")
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        if votes[0]:
            raise Interrupted("by a signal")
        return votes[1].item()

    def alone(self) -> None:
        """From here on this rank works without the others: a signal raises Interrupted wherever it is."""
        self._alone = True
        if self._received:
            raise Interrupted("by a signal")
