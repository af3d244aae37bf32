"""Which experts go together: in a token's choices of a layer, and from one layer to the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import choices
from rmoe_megablocks.analysis.measuring.entries import CLOSED, entry
from rmoe_megablocks.analysis.measuring.passes.pieces import Piece

_OLMOE = "OLMoE (2409.02060), all pairs counted"


class Pairs:
    """``coactivation``, ``coactivation_of_either`` [L, E, E]; ``transitions`` [L-1, E, E], ``predictability`` [L-1]."""

    def __init__(self, about: Any, blocks: int) -> None:
        layers, experts = len(about.layers), about.experts
        self._about, self._blocks = about, blocks
        self._together_LEE = np.zeros((layers, experts, experts), np.int64)
        self._next_LEE = np.zeros((layers - 1, experts, experts), np.int64)
        self._best_2LEE = np.zeros((2, layers - 1, experts, experts), np.int64)  # of even blocks, of odd ones
        self._sizes_LK = np.zeros((layers, about.topk + 1), np.int64)

    def add(self, piece: Piece) -> None:
        chosen_LTK = piece.choices_TLK.transpose(1, 0, 2)
        experts = self._about.experts
        # float32 for the sake of its fast product: counts of a piece are whole numbers that it holds
        one_LTE = _one_hot(chosen_LTK, experts)
        self._together_LEE += (one_LTE.transpose(0, 2, 1) @ one_LTE).astype(np.int64)
        sizes = (chosen_LTK >= 0).sum(2)
        for layer, row in enumerate(sizes):
            self._sizes_LK[layer] += np.bincount(row, minlength=self._sizes_LK.shape[1])
        if len(self._next_LEE):
            turned = one_LTE[:-1].transpose(0, 2, 1)
            self._next_LEE += (turned @ one_LTE[1:]).astype(np.int64)
            best = _one_hot(chosen_LTK[:-1, :, :1], experts).transpose(0, 2, 1)
            self._best_2LEE[piece.block % 2] += (best @ one_LTE[1:]).astype(np.int64)

    def entries(self) -> dict:
        experts = self._about.experts
        one, two = self._uniform()
        counts = self._together_LEE
        where = ["layer", "expert", "other_expert"]
        found = {
            "coactivation": entry([choices.coactivation(one) for one in counts], where, "share",
                baseline=self._square(two, one), baseline_is=f"{CLOSED}: uniform random router", source=_OLMOE,
                note="where i was chosen, how often j was too; the diagonal is 1. A busy expert is with everybody, "
                "whatever the tokens."),
            "coactivation_of_either": entry([choices.coactivation_of_either(one) for one in counts], where, "share",
                baseline=self._square(two, 2 * one - two), baseline_is=f"{CLOSED}: uniform random router",
                source="Jaccard index; " + _OLMOE,
                note="of the tokens that chose i or j, those that chose both; the diagonal is 1."),
        }  # fmt: skip
        if not len(self._next_LEE):
            return found
        loads = self._next_LEE.sum(1, keepdims=True) / np.maximum(self._next_LEE.sum((1, 2), keepdims=True), 1)
        total = self._next_LEE.sum(2, keepdims=True)
        found["transitions"] = entry(
            self._next_LEE / np.where(total, total, np.nan), ["layer", "expert", "next_expert"], "share",
            baseline=np.broadcast_to(loads, self._next_LEE.shape),
            baseline_is=f"{CLOSED}: the next layer's loads in every row",
            source="P(expert of the next layer | expert of this one), all choices of both",
            note=f"rows sum to 1; null of an expert that nobody chose, of {experts}. `information` [L-1], nats: what "
            "the table tells of one choice by the other; counted, independent layers have `information_baseline`.",
            information=[choices.dependence(one) for one in self._next_LEE],
            information_baseline=self._counted_by_chance(),
        )  # fmt: skip
        if self._blocks > 1:
            found["predictability"] = self._predictability()
        return found

    def _predictability(self) -> dict:
        even, odd = self._best_2LEE
        k = self._about.topk
        both = np.array(
            [
                np.mean([choices.predictability(a, b, k), choices.predictability(b, a, k)], axis=0)
                for a, b in zip(even, odd, strict=True)
            ]
        )
        return entry(
            both[:, 0],
            ["layer"],
            "share",
            baseline=both[:, 1],
            baseline_is="the K busiest experts of the next layer, whatever this one chose",
            source="after Megatron-LM, tools/moe_routing/analyze_routing_predictability.py, by choices",
            note="of the next layer's choices, those among the K that follow this layer's best expert most often; "
            "counted in one half of the text, told of the other, mean of both ways.",
        )

    def _uniform(self) -> tuple[np.ndarray, np.ndarray]:
        """[L]: of a uniform random router with sets as large as those of each layer, how likely one expert is chosen,
        and two given ones are."""
        experts = self._about.experts
        size = np.arange(self._sizes_LK.shape[1])
        tokens = np.maximum(self._sizes_LK.sum(1), 1)
        one = (self._sizes_LK * size).sum(1) / tokens / experts
        two = (self._sizes_LK * size * (size - 1)).sum(1) / tokens / (experts * max(experts - 1, 1))
        return one, two

    def _counted_by_chance(self) -> np.ndarray:
        """[L-1]: what :func:`..measures.choices.dependence` has of independent layers with uniform loads. Sets of K of
        E vary less than K draws would, each layer's by (E - K) / (E - 1)."""
        experts = self._about.experts
        mean = (self._sizes_LK * np.arange(self._sizes_LK.shape[1])).sum(1) / np.maximum(self._sizes_LK.sum(1), 1)
        pairs = np.maximum(self._next_LEE.sum((1, 2)), 1)
        return (experts - mean[:-1]) * (experts - mean[1:]) / (2 * pairs)

    def _square(self, both_L: np.ndarray, of_L: np.ndarray) -> np.ndarray:
        """[L, E, E]: the same share for any two experts, 1 on the diagonal."""
        share = both_L / np.where(of_L, of_L, np.nan)
        eye = np.eye(self._about.experts)
        return share[:, None, None] * (1 - eye) + eye

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        return {}


def _one_hot(chosen_LTK: np.ndarray, experts: int) -> np.ndarray:
    """float32 [L, T, E]; entries of -1 are left out."""
    result = np.zeros((*chosen_LTK.shape[:2], experts + 1), np.float32)
    np.put_along_axis(result, chosen_LTK, 1, axis=2)  # -1 is the last column
    return result[:, :, :experts]
