"""Which neurons of a feed-forward layer become which expert (LLaMA-MoE, arXiv 2406.16554, section 3.1)."""

import numpy as np
import torch
from torch import Tensor

from rmoe_megablocks.errors import UsageError

METHODS = RANDOM, CLUSTERING = ("random", "clustering")
_ROUNDS = 10  # of clustering; assignments rarely change after a few


def split(gate_FH: Tensor, experts: int, method: str, seed: int) -> Tensor:
    """[E, F/E]: the neurons of each expert, every neuron in one of them, in ascending order.

    Args:
        gate_FH: rows of the gate's matrix, one a neuron: by which they are clustered.
        experts: E, which divides F.
        method: ``random``: a permutation, cut; ``clustering``: k-means with clusters of one size.
        seed: of either.

    Raises:
        UsageError: clustering without scipy.
    """
    neurons = len(gate_FH)
    generator = np.random.default_rng(seed)
    if method == RANDOM:
        of_expert = generator.permutation(neurons).reshape(experts, -1)
    else:
        labels = _balanced_clusters(gate_FH.float().numpy(), experts, generator)
        of_expert = np.stack([np.flatnonzero(labels == expert) for expert in range(experts)])
    return torch.from_numpy(np.sort(of_expert, axis=1))


def check_available(method: str) -> None:
    """Raises UsageError where ``method`` needs what is not installed."""
    if method == CLUSTERING:
        try:
            import scipy  # noqa: F401
        except ImportError:
            raise UsageError("--split-method clustering needs scipy: pip install 'rmoe-megablocks[compare]'") from None


def _balanced_clusters(rows: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """The cluster of each row. scipy's k-means gives the first centres; then rows are assigned anew, as many to each
    centre, and centres moved, until nothing changes."""
    from scipy.cluster.vq import kmeans2

    centres, labels = kmeans2(rows, clusters, minit="++", rng=generator, missing="warn")
    for _ in range(_ROUNDS):
        squares = (centres**2).sum(1) - 2 * rows @ centres.T  # distances, less what is the same for all centres
        before, labels = labels, _assign(squares)
        if np.array_equal(before, labels):
            break
        centres = np.stack([rows[labels == cluster].mean(0) for cluster in range(clusters)])
    return labels


def _assign(costs_FE: np.ndarray) -> np.ndarray:
    """The cheapest assignment with as many rows a column: a transportation problem, whose vertices are whole."""
    from scipy import sparse
    from scipy.optimize import linprog

    rows, columns = costs_FE.shape
    once = sparse.kron(sparse.eye(rows), np.ones(columns))
    as_many = sparse.kron(np.ones(rows), sparse.eye(columns))
    totals = np.concatenate([np.ones(rows), np.full(columns, rows // columns)])
    found = linprog(costs_FE.ravel(), A_eq=sparse.vstack([once, as_many], "csr"), b_eq=totals, method="highs-ds")
    if found.x is None:
        raise RuntimeError(f"the assignment has no solution: {found.message}")  # it always has one
    return found.x.reshape(rows, columns).argmax(1)
