"""Sum of a model's losses over windows of a text, in one process or several."""

import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.windows import Window, Windows

_LEFT_OUT = -100


@dataclass
class Sum:
    """``nats`` of ``tokens`` predicted tokens; ``interrupted`` where a signal came before all were."""

    nats: float = 0.0
    tokens: int = 0
    interrupted: bool = False


class Processes:
    """The processes that share the windows: those of ``accelerate launch`` or torchrun, else this one alone.

    Attributes:
        rank, size: of this process, of all.
        device: of this process.
    """

    def __init__(self, device: str | None) -> None:
        """Args: device: as ``--device``; None for a GPU where there is one. Raises UsageError if it is not there."""
        self.rank, self.size = 0, 1
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
        if size > 1:
            torch.distributed.init_process_group("gloo")  # three numbers a batch
            self.rank, self.size = torch.distributed.get_rank(), size

    def add(self, *values: float) -> list[float]:
        """The sums of all processes, in double precision. Collective."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()


@torch.inference_mode()
def predict(
    model: torch.nn.Module,
    tokens: np.ndarray,
    windows: Windows,
    batch: int,
    processes: Processes,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Sum:
    """Predicts the tokens of all windows, ``batch`` of them at once in a process, until done or told to stop.

    Collective. The windows go to the processes in turn, so that what is done at an interruption is the text's
    beginning. Losses are of fp32 logits and summed in double precision.

    Args:
        model: of transformers, causal, in evaluation mode.
        tokens: [T].
        advance: called with the number of tokens predicted since it was called last, by all processes.

    Raises:
        UsageError: the loss is not finite.
    """
    done = Sum()
    batches = -(-len(windows) // batch)
    with noted_signals() as received:
        for first in range(0, batches, processes.size):
            begin = (first + processes.rank) * batch
            chosen = [windows[i] for i in range(begin, min(begin + batch, len(windows)))]
            nats = _losses(model, tokens, chosen, processes.device) if chosen else 0.0
            scored = sum(window.scored for window in chosen)
            nats, scored, stop = processes.add(nats, scored, len(received))
            done.nats += nats
            done.tokens += int(scored)
            advance(int(scored))
            if not np.isfinite(done.nats):
                raise UsageError(f"the loss is {nats} within the first {done.tokens:,} tokens: the weights are damaged")
            if stop and done.tokens < windows.predicted:
                done.interrupted = True
                break
    return done


def _losses(model: torch.nn.Module, tokens: np.ndarray, chosen: list[Window], device: torch.device) -> float:
    """Nats of the scored tokens of some windows; shorter ones are padded behind their end, which they cannot see."""
    ids_BS, labels_BS = (x.to(device) for x in batch_of(tokens, chosen))
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    losses = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), ignore_index=_LEFT_OUT, reduction="none"
    )
    return losses.sum(dtype=torch.float64).item()


def batch_of(tokens: np.ndarray, chosen: list[Window]) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S], int64, of windows; labels that do not count are -100."""
    longest = max(window.length for window in chosen)
    ids = np.zeros((len(chosen), longest), np.int64)
    labels = np.full((len(chosen), longest), _LEFT_OUT, np.int64)
    for row, window in enumerate(chosen):
        ids[row, : window.length] = tokens[window.start : window.end]
        counted = slice(window.length - window.scored, window.length)
        labels[row, counted] = tokens[window.end + 1 - window.scored : window.end + 1]
    return torch.from_numpy(ids), torch.from_numpy(labels)


@contextmanager
def noted_signals():
    """The first Ctrl-C or SIGTERM is noted in the list it gives; the second one acts as ever."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
