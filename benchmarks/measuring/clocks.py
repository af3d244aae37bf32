"""How long a call takes, on the machine at hand."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from rmoe_megablocks.process import progress_stream

_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 cache of today's GPUs


class Clock:
    """Seconds of a call: wall or processor time on a CPU, the device's time between two events on a GPU.

    On a GPU a buffer larger than its L2 cache is written before every call, so that operands come from memory; while
    that runs, the host is already ahead of the device, as it is in a long training step.
    """

    def __init__(self, device: torch.device, processor_time: bool = False) -> None:
        self._read = time.process_time if processor_time else time.perf_counter
        self._events = None
        if device.type == "cuda":
            self.name = "device time between CUDA events, 256 MiB written before each call so that L2 is cold"
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        else:
            self.name = "processor time" if processor_time else "wall time"

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call; what it returns is freed after the clock has stopped."""
        if self._events is None:
            start = self._read()
            result = call()
            seconds = self._read() - start
            del result
            return seconds
        self._flush.zero_()
        self._events[0].record()
        result = call()
        self._events[1].record()
        torch.cuda.synchronize()
        del result
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def progress(total: int, what: str) -> tqdm:
    """A bar on standard error, and a line every five seconds or so where that is no terminal."""
    lines = not sys.stderr.isatty()
    return tqdm(total=total, desc=what, file=progress_stream(), mininterval=5.0 if lines else 0.5, leave=False)
