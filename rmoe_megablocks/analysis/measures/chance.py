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


def uniform_loads(sizes: np.ndarray, experts: int, draws: int = 20, seed: int = 0) -> np.ndarray:
    """[draws, E]: how often each expert is chosen where every token takes a set of experts, all alike likely.

    Args:
        sizes: [K + 1], how many tokens take 0, 1 ... K different experts.

    Where an expert has 100 choices or more on average, counts are drawn as Gaussian ones of the same covariance
    (equal variances, one sum); else token by token.
    """
    generator = np.random.default_rng(seed)
    share = np.arange(len(sizes)) / experts
    mean = (sizes * share).sum()
    if mean >= 100:
        deviation = np.sqrt((sizes * share * (1 - share)).sum() * experts / max(experts - 1, 1))
        noise = generator.standard_normal((draws, experts))
        return mean + deviation * (noise - noise.mean(1, keepdims=True))
    taken = np.repeat(np.arange(len(sizes)), sizes)
    found = np.empty((draws, experts))
    for draw in range(draws):
        order = np.argsort(generator.random((len(taken), experts)), axis=1)[:, : len(sizes) - 1]
        found[draw] = np.bincount(order[np.arange(len(sizes) - 1) < taken[:, None]], minlength=experts)
    return found
