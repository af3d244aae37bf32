"""The least time that a forward step takes on this machine, from rates that are measured on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measuring.clocks import Clock
from benchmarks.routing_step.sizes import Size

_REPEATS = 7
_COPIED = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes: many times any cache
_ROWS = {"cpu": 1024, "cuda": 8192}  # of the square matrices


@dataclass(frozen=True)
class Rates:
    """Of the machine: ``copy`` in bytes read and written a second, ``matmul`` in FLOP a second."""

    copy: float
    matmul: float

    def forward_seconds(self, size: Size, tokens: int) -> float:
        """The larger of the times that memory and arithmetic take."""
        return tokens * max(forward_bytes(size) / self.copy, forward_flop(size) / self.matmul)


def forward_bytes(size: Size) -> int:
    """Memory traffic of a token: hidden state and state read, new state and logits written, x' written for the
    backward pass in the dtype of the hidden states. Each once; x' is not read again, as in a kernel that has the
    projector inside. Parameters (0.5 MB at H 1280 in bf16) are left out: they stay in a cache.
    """
    H, P, E = size.hidden_size, size.state_size, size.experts
    return size.hidden.itemsize * (H + P) + size.state.itemsize * (2 * P + E)


def forward_flop(size: Size) -> int:
    """Products of a token, two FLOP a multiplication and addition: projector, six of the GRU, router. What is
    pointwise (about 20 P) is left out.
    """
    H, P, E = size.hidden_size, size.state_size, size.experts
    return 2 * H * P + 12 * P * P + 2 * P * E


def measure(device: torch.device, dtype: torch.dtype, clock: Clock) -> Rates:
    """The best of a few large copies, and of a few products of square matrices in ``dtype``."""
    return Rates(_copied(device, clock), _multiplied(device, dtype, clock))


def _copied(device: torch.device, clock: Clock) -> float:
    size = _COPIED[device.type]
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / _best(lambda: target.copy_(source), clock)


def _multiplied(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    rows = _ROWS[device.type]
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    return 2 * rows**3 / _best(lambda: a @ b, clock)


def _best(call: Callable[[], object], clock: Clock) -> float:
    call()
    return min(clock.seconds(call) for _ in range(_REPEATS))
