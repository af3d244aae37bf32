"""What chance gives."""

from __future__ import annotations

import numpy as np


def shuffled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """``values`` [T, ...] with their tokens in another order: what is left of a relation between layers is no
    relation of a token's routing, but of how layers route as a whole."""
    return values[np.random.default_rng(seed).permutation(len(values))]


def uniform_choices(tokens: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
    """[T, K]: K different experts of every token, all sets alike likely."""
    draws = np.random.default_rng(seed).random((tokens, experts))
    return np.argsort(draws, axis=1)[:, :k]
