"""Mutual information between the gates of two layers, as the RMoE paper measures it.

For each token the E gate scores of a layer are put into 100 bins of linspace(0, 1); the E pairs (bin in one layer, bin
in the other) are a sample of a joint distribution, whose mutual information in nats is averaged over tokens (paper,
section 5; scikit-learn's mutual_info_score of the two vectors of bins).

By chance it is not zero, and it says more about how flat gates are than about what layers share: with E pairs and many
bins two independent vectors share nearly all bits that each has. The flattest gates, all in one bin, have 0; in between
independent routers reach values above 1. So never alone: :func:`mutual_information` of shuffled tokens beside it.
"""

from __future__ import annotations

import numpy as np

BINS = 100
_WORD = 64


def bins(scores_TE: np.ndarray) -> np.ndarray:
    """The bin of each score, from 1 on, as numpy.digitize(scores, linspace(0, 1, 100)) has it."""
    return np.digitize(scores_TE, np.linspace(0, 1, BINS)).astype(np.int16)


def equal_masks(bins_TE: np.ndarray) -> np.ndarray:
    """[T, E, words] of 64 bits: bit j of row i says whether scores i and j are in the same bin."""
    tokens, experts = bins_TE.shape
    masks = np.zeros((tokens, experts, -(-experts // _WORD)), np.uint64)
    for j in range(experts):
        same = (bins_TE == bins_TE[:, j : j + 1]).astype(np.uint64)
        masks[:, :, j // _WORD] |= same << np.uint64(j % _WORD)
    return masks


def mutual_information(masks_a: np.ndarray, masks_b: np.ndarray) -> float:
    """Mean over tokens, nats, of two layers' :func:`equal_masks`.

    With n_i scores in the bin of score i, m_i in the other layer, and c_i in both, a token has
    log E + mean_i (log c_i - log n_i - log m_i): sums over pairs of bins, written as sums over scores.
    """
    experts = masks_a.shape[1]
    logs = np.log(np.arange(1, experts + 1))
    both = _count(masks_a & masks_b)
    found = logs[both - 1] - logs[_count(masks_a) - 1] - logs[_count(masks_b) - 1]
    return float(np.log(experts) + found.mean(dtype=np.float64))


def between_layers(scores_TLE: np.ndarray) -> np.ndarray:
    """[L, L] of all pairs; the diagonal is the entropy of a layer's bins."""
    masks = [equal_masks(bins(scores_TLE[:, layer])) for layer in range(scores_TLE.shape[1])]
    return _matrix(masks, masks)


def between_shuffled_layers(scores_TLE: np.ndarray, seed: int = 0) -> np.ndarray:
    """[L, L] of the same with the second layer's tokens in another order: what independent routers of the same
    flatness have. The diagonal, a layer beside itself in other tokens, is one of them."""
    order = np.random.default_rng(seed).permutation(len(scores_TLE))
    masks = [equal_masks(bins(scores_TLE[:, layer])) for layer in range(scores_TLE.shape[1])]
    return _matrix(masks, [one[order] for one in masks])


def adjusted(found_LL: np.ndarray, by_chance_LL: np.ndarray) -> np.ndarray:
    """[..., L, L], 0 for what chance gives and 1 for a copy: what is above chance over what could be, the mean of both
    layers' entropies less chance. The adjusted mutual information of Vinh, Epps and Bailey (2010), with shuffled tokens
    for chance.

    What is above chance is not enough to compare routers: how much there can be depends on how flat gates are as well.
    A layer that copies another one for half of the tokens has .5 whatever the gates. NaN where chance is all there is.
    """
    entropy = np.diagonal(found_LL, axis1=-2, axis2=-1)
    by_chance = (by_chance_LL + np.swapaxes(by_chance_LL, -1, -2)) / 2  # either layer's tokens shuffled
    room = (entropy[..., :, None] + entropy[..., None, :]) / 2 - by_chance
    return (found_LL - by_chance) / np.where(room > 1e-6, room, np.nan)


def _matrix(rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    return np.array([[mutual_information(a, b) for b in columns] for a in rows])


def _count(masks: np.ndarray) -> np.ndarray:
    return np.bitwise_count(masks).sum(axis=-1, dtype=np.int64)
