"""How choices of experts go together: in a layer, from layer to layer, from checkpoint to checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def saturation(chosen_TK: np.ndarray, last_TK: np.ndarray) -> float:
    """Share of the last checkpoint's choices that an earlier one made as well, over all tokens (OLMoE, 2409.02060).

    Entries below 0 are no choices: none of the last one's counts, and none is found. Two unrelated routers with uniform
    loads have K/E.
    """
    found, of = same(chosen_TK, last_TK)
    return found / of if of else float("nan")


def same(chosen_TK: np.ndarray, last_TK: np.ndarray) -> tuple[int, int]:
    """How many of the last one's choices the other made as well, and how many the last one made."""
    real = last_TK >= 0
    found = (last_TK[..., :, None] == chosen_TK[..., None, :]).any(-1) & real
    return int(found.sum()), int(real.sum())


def together(chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """[E, E] counts: tokens that chose both i and j; the diagonal has those that chose i. All pairs, not only those
    that are neighbours in rank."""
    chosen_TE = _one_hot(chosen_TK, experts)
    return chosen_TE.T @ chosen_TE


def coactivation(counts_EE: np.ndarray) -> np.ndarray:
    """[E, E]: where i was chosen, how often j was too (OLMoE). With independent uniform choices (K-1)/(E-1)."""
    own = np.diag(counts_EE).astype(np.float64)
    return counts_EE / np.where(own, own, np.nan)[:, None]


def coactivation_of_either(counts_EE: np.ndarray) -> np.ndarray:
    """[E, E]: of the tokens that chose i or j, those that chose both (Jaccard): the same for both of a pair."""
    own = np.diag(counts_EE).astype(np.float64)
    either = own[:, None] + own[None, :] - counts_EE
    return counts_EE / np.where(either, either, np.nan)


def transitions(first_TK: np.ndarray, next_TK: np.ndarray, experts: int) -> np.ndarray:
    """[E, E]: of what tokens of expert i choose in the next layer, the share of j. Rows sum to 1 (NaN of an expert that
    nobody chose). Independent layers have the next layer's loads in every row."""
    counts = _one_hot(first_TK, experts).T @ _one_hot(next_TK, experts)
    total = counts.sum(1, keepdims=True).astype(np.float64)
    return counts / np.where(total, total, np.nan)


class Paths(NamedTuple):
    """Sequences of best experts over the layers.

    Attributes:
        number: how many different ones there are; at most T, so that it grows with the text.
        entropy: of their distribution, nats, as counted (too small where T is not far above ``number``).
        top: [N, L], the most frequent ones.
        shares: [N], of the tokens.
    """

    number: int
    entropy: float
    top: np.ndarray
    shares: np.ndarray


def paths(chosen_TLK: np.ndarray, top: int = 10) -> Paths:
    """Of every token the best expert of each layer. Independent layers have the sum of their loads' entropies."""
    found, counts = np.unique(chosen_TLK[:, :, 0], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shares = counts / counts.sum()
    return Paths(len(found), float(-(shares * np.log(shares)).sum()), found[order[:top]], shares[order[:top]])


def predicted(logits_TE: np.ndarray, chosen_TK: np.ndarray) -> float:
    """Share of a layer's choices among the K best of ``logits_TE``, another prediction of it: as the next layer's
    router on this layer's hidden states (Megatron-LM, tools/moe_routing/analyze_routing_predictability.py). Chance: K/E
    with uniform loads."""
    k = chosen_TK.shape[1]
    return saturation(np.argpartition(-logits_TE, k - 1, axis=1)[:, :k], chosen_TK)


def predictability(fitted_EE: np.ndarray, held_out_EE: np.ndarray, k: int) -> tuple[float, float]:
    """Share of the next layer's choices that are among the K most frequent ones after this layer's best expert, and the
    share of the K that are most frequent whatever this layer chose, which is what chance gives.

    Counts [best expert of this layer, choice of the next]: the K are taken from one half of the text, the shares from
    the other, so that a table with as many entries as there are tokens does not predict by heart.
    """
    total = held_out_EE.sum()
    if not total or not fitted_EE.sum():
        return float("nan"), float("nan")
    overall = fitted_EE.sum(0)
    # ties, as in rows nobody fitted, go to what is frequent overall
    ranked = fitted_EE + overall / (overall.sum() + 1)
    best = np.argsort(-ranked, axis=1, kind="stable")[:, :k]
    usual = np.argsort(-overall, kind="stable")[:k]
    hits = np.take_along_axis(held_out_EE, best, axis=1).sum()
    return float(hits / total), float(held_out_EE[:, usual].sum() / total)


def dependence(counts_EE: np.ndarray) -> float:
    """Mutual information, nats, of a table of counts: 0 where rows are alike. Of N counted pairs, independent ones have
    about (E-1)^2 / 2N."""
    total = counts_EE.sum()
    if not total:
        return float("nan")
    share = counts_EE / total
    by_chance = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    there = share > 0
    return float((share[there] * np.log(share[there] / by_chance[there])).sum())


def _one_hot(chosen_TK: np.ndarray, experts: int) -> np.ndarray:
    """[T, E] of 0 and 1; entries outside 0 to E-1 are left out."""
    result = np.zeros((len(chosen_TK), experts + 1), np.int64)
    real = np.where((chosen_TK >= 0) & (chosen_TK < experts), chosen_TK, experts)
    np.put_along_axis(result, real, 1, axis=1)
    return result[:, :experts]
