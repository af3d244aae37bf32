"""How alike experts are, and rows of a router."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def expert_similarity(w1_EFH: np.ndarray, w3_EFH: np.ndarray, w2_EHF: np.ndarray) -> np.ndarray:
    """[E, E] cosines of experts: each one's three matrices averaged over the inner width F, each average set to length
    1, put one behind the other (RMoE paper, section 5).

    The paper does not set the whole to length 1 and tells the mean of all products, diagonal included:
    :func:`paper_mean`. Independent Gaussian experts have 0 beside the diagonal.
    """
    means = [w1_EFH.mean(1), w3_EFH.mean(1), w2_EHF.mean(2)]
    vectors = np.concatenate([_unit(mean) for mean in means], axis=1)
    return vectors @ vectors.T / len(means)


def paper_mean(similarity_EE: np.ndarray) -> float:
    """The paper's figure: three times the mean of all entries. Independent experts have 3/E, .1875 with 16."""
    return float(3 * similarity_EE.mean())


def mean_of_others(similarity_EE: np.ndarray) -> float:
    """Mean beside the diagonal: independent experts have 0."""
    n = len(similarity_EE)
    return float((similarity_EE.sum() - np.trace(similarity_EE)) / (n * (n - 1)))


def row_similarity(router_EH: np.ndarray) -> np.ndarray:
    """[E, E] cosines of a router's rows; independent Gaussian rows have 0 ± 1/sqrt(H)."""
    rows = _unit(router_EH)
    return rows @ rows.T


def alignment(router_ED: np.ndarray, experts_ED: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[E] cosines of each router row and its expert's vector in the same space; chance: 0 ± 1/sqrt(D)."""
    return (_unit(router_ED) * _unit(np.asarray(experts_ED))).sum(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
