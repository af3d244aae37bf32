"""Which experts a domain's, or a token's, choices go to (OLMoE, 2409.02060)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def shares(chosen_TK: np.ndarray, labels_T: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels and [labels, E]: of the choices of a label's tokens, the share of each expert; rows sum to 1.

    A router that does not look at the label has its loads in every row, 1/E with uniform ones.
    """
    found, index = np.unique(labels_T, return_inverse=True)
    real = (chosen_TK >= 0) & (chosen_TK < experts)
    pairs = (index[:, None] * experts + np.where(real, chosen_TK, 0))[real]
    counts = np.bincount(pairs, minlength=len(found) * experts).reshape(len(found), experts)
    total = counts.sum(1, keepdims=True).astype(np.float64)
    return found, counts / np.where(total, total, np.nan)


class Specialisation(NamedTuple):
    """How much of a label's choices its favourite experts have.

    Attributes:
        value: mean over the labels, weighted by their tokens.
        chance: the same with labels shuffled among the tokens: rare labels look specialised by chance.
    """

    value: float
    chance: float


def specialisation(chosen_TK: np.ndarray, labels_T: np.ndarray, experts: int, seed: int = 0) -> Specialisation:
    """Of each label the share of its choices that its K favourite experts have, K being the choices a token has."""
    other = np.random.default_rng(seed).permutation(labels_T)
    return Specialisation(_favourites(chosen_TK, labels_T, experts), _favourites(chosen_TK, other, experts))


def _favourites(chosen_TK: np.ndarray, labels_T: np.ndarray, experts: int) -> float:
    found, rows = shares(chosen_TK, labels_T, experts)
    k = chosen_TK.shape[1]
    weights = np.unique(labels_T, return_counts=True)[1]
    best = np.sort(np.nan_to_num(rows), axis=1)[:, -k:].sum(1)
    return float((best * weights).sum() / weights.sum())
