"""How many tokens experts get."""

from __future__ import annotations

import numpy as np


def counts(chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """[E]: how often each was chosen; entries outside 0 to E-1 (null experts, none) are left out."""
    real = chosen_TK[(chosen_TK >= 0) & (chosen_TK < experts)]
    return np.bincount(real.ravel(), minlength=experts)


def max_violation(counts_E: np.ndarray) -> float:
    """MaxVio: the largest load over the mean, less 1 (Loss-Free Balancing, 2408.15664). Uniform loads have 0.

    Of one batch or of all tokens: the first is larger by chance, by about sqrt(2 ln E / mean load).
    """
    mean = counts_E.mean()
    return float(counts_E.max() / mean - 1) if mean else float("nan")


def batch_max_violation(chosen_TK: np.ndarray, experts: int, batch: int) -> float:
    """Mean of :func:`max_violation` over whole batches of ``batch`` tokens. Raises ValueError where there is none."""
    whole = len(chosen_TK) // batch
    if not whole:
        raise ValueError(f"{len(chosen_TK)} tokens are less than one batch of {batch}")
    return float(
        np.mean([max_violation(counts(part, experts)) for part in np.split(chosen_TK[: whole * batch], whole)])
    )


def gini(counts_E: np.ndarray) -> float:
    """Gini coefficient of the loads: 0 uniform, (E-1)/E where one expert has all."""
    ordered = np.sort(counts_E.astype(np.float64))
    total, n = ordered.sum(), len(ordered)
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total)) if total else float("nan")


def dead(counts_E: np.ndarray, share: float = 0.01) -> np.ndarray:
    """Numbers of the experts with less than ``share`` of the mean load."""
    return np.flatnonzero(counts_E < share * counts_E.mean())


def coverage(counts_E: np.ndarray) -> np.ndarray:
    """[E]: share of all choices that the N busiest experts have, N from 1 to E. Uniform loads have N/E
    (Megatron-LM, tools/moe_routing/analyze_routing_concentration.py)."""
    ordered = np.sort(counts_E)[::-1].astype(np.float64)
    return np.cumsum(ordered) / ordered.sum()
