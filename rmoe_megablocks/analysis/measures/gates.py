"""How a layer's gates look: flat or sharp, sure or not."""

from __future__ import annotations

import numpy as np


def inside_balance(scores_TE: np.ndarray) -> np.ndarray:
    """[T]: the best score over the second (IB of the RMoE paper, which tells its median). Flat gates have 1."""
    best = np.partition(scores_TE, -2, axis=-1)
    return best[..., -1] / best[..., -2]


def outside_balance(scores_TE: np.ndarray, k: int) -> np.ndarray:
    """[T]: sum of the K best scores (OB of the RMoE paper, which tells its median). Flat gates have K/E."""
    return np.partition(scores_TE, -k, axis=-1)[..., -k:].sum(-1)


def entropy(scores_TE: np.ndarray) -> np.ndarray:
    """[T], nats. Flat gates have ln E, one expert 0."""
    logs = np.log(np.where(scores_TE > 0, scores_TE, 1))
    return -(scores_TE * logs).sum(-1)


def margin(logits_TE: np.ndarray, k: int) -> np.ndarray:
    """[T]: the K-th logit less the one after it: how far the choice is from another one. Softmax scores may be given as
    their logarithms; the difference is the same."""
    ordered = np.partition(logits_TE, (-k - 1, -k), axis=-1)
    return ordered[..., -k] - ordered[..., -k - 1]
