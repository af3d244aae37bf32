"""Which sizes have a kernel, and the tiles it is launched with. Plain data: neither Triton nor torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_SIZE = 512  # of P and E
FUSED_SIZE = 128  # the widest state whose weights go through one program's tiles; wider ones use cuBLAS
FUSED_EXPERTS = 64  # the most logits that a program carries in registers beside the gates


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    Attributes:
        rows: tokens of a program.
        columns: of a gate, computed at a time.
        warps, stages: as Triton's.
    """

    rows: int
    columns: int
    warps: int
    stages: int


BACKWARD = Tile(64, 16, 4, 1)
POINTWISE = Tile(16, 64, 4, 1)


def forward_tile(major: int) -> Tile:
    """For a compute capability of this first digit: before 9, products of 32 columns spill out of the registers."""
    return Tile(64, 32, 4, 1) if major >= 9 else Tile(64, 16, 4, 1)


def padded(size: int) -> int:
    """The next power of two, at least the 16 of a tensor core's product."""
    return max(16, 1 << (size - 1).bit_length())


def is_fused(size: int, low: bool) -> bool:
    """Whether P columns and operands of two bytes (``low``) go through the fused kernels.

    fp32 operands do not: Triton's exact product is scalar arithmetic, and its fast ones round to tf32.
    """
    return low and padded(size) <= FUSED_SIZE


def logits_fused(size: int, experts: int, low: bool) -> bool:
    """Whether the forward kernel computes the logits as well."""
    return is_fused(size, low) and padded(experts) <= FUSED_EXPERTS
