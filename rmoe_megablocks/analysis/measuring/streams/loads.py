"""How many tokens experts get, of all text, of a batch, and of a domain."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import chance, choices, load
from rmoe_megablocks.analysis.measuring.entries import CLOSED, UNIFORM, entry, mean_over
from rmoe_megablocks.analysis.measuring.passes.pieces import Piece
from rmoe_megablocks.analysis.measuring.passes.survey import Survey

_LOSS_FREE = "Loss-Free Balancing (2408.15664)"
_OLMOE = "OLMoE (2409.02060)"
_DEAD = 0.01  # of the mean load


class Loads:
    """``load``, ``coverage`` [L, E]; ``max_violation_global``, ``max_violation_batch``, ``gini``, ``dead_experts`` [L];
    ``domain_specialisation`` [D, L, E] where there are several domains."""

    def __init__(self, about: Any, found: Survey, batch: int, seed: int) -> None:
        layers, experts, domains = len(about.layers), about.experts, len(found.domains)
        self._about, self._domains, self._batch, self._seed = about, found.domains, batch, seed
        self._counts_JLE = np.zeros((found.blocks, layers, experts), np.int64)
        self._batch_LE = np.zeros((layers, experts), np.int64)
        self._batches_JL = np.zeros((found.blocks, layers))
        self._batches_J = np.zeros(found.blocks, np.int64)
        self._domain_DLE = np.zeros((domains, layers, experts), np.int64)
        self._shuffled_DLE = np.zeros((domains, layers, experts), np.int64)
        self._tokens_D = np.zeros(domains, np.int64)
        self._shuffled_tokens_D = np.zeros(domains, np.int64)
        self._sizes = np.zeros(about.topk + 1, np.int64)  # of tokens and layers, by how many experts they chose

    def add(self, piece: Piece) -> None:
        domains, layers, experts = self._domain_DLE.shape
        chosen = piece.choices_TLK
        real = chosen >= 0
        self._sizes += np.bincount(real.sum(2).ravel(), minlength=len(self._sizes))
        places = np.where(real, chosen, 0) + np.arange(layers)[None, :, None] * experts
        counts_DLE = self._by_label(piece.domain_T, places, real)
        self._domain_DLE += counts_DLE
        self._tokens_D += np.bincount(piece.domain_T, minlength=domains)
        if domains > 1:
            self._shuffled_DLE += self._by_label(piece.shuffled_domain_T, places, real)
            self._shuffled_tokens_D += np.bincount(piece.shuffled_domain_T, minlength=domains)
        counts_LE = counts_DLE.sum(0)
        self._counts_JLE[piece.block] += counts_LE
        self._batch_LE += counts_LE
        if piece.stop % self._batch == 0:
            self._batches_JL[piece.block] += [load.max_violation(counts) for counts in self._batch_LE]
            self._batches_J[piece.block] += 1
            self._batch_LE[:] = 0

    def _by_label(self, label_T: np.ndarray, places_TLK: np.ndarray, real_TLK: np.ndarray) -> np.ndarray:
        shape = self._domain_DLE.shape
        index = (label_T[:, None, None] * (shape[1] * shape[2]) + places_TLK)[real_TLK]
        return np.bincount(index, minlength=np.prod(shape)).reshape(shape)

    @property
    def counts_LE(self) -> np.ndarray:
        return self._counts_JLE.sum(0)

    def entries(self) -> dict:
        counts, experts = self.counts_LE, self._about.experts
        total = counts.sum(1, keepdims=True)
        uniform = self._uniform(1.0)
        dead = [load.dead(row, _DEAD) for row in counts]
        over = ["layer", "expert"]
        found = {
            "load": entry(counts / np.where(total, total, np.nan), over, "share", baseline=1 / experts,
                baseline_is=f"{CLOSED}: uniform loads", source="share of a layer's choices",
                note=self._nulls() + "A choice of a token counts once, whatever its weight."),
            "max_violation_global": entry([load.max_violation(row) for row in counts], ["layer"], "share of mean load",
                baseline=np.mean([load.max_violation(row) for row in uniform]), baseline_is=UNIFORM, source=_LOSS_FREE,
                note="largest load over the mean, less 1, of all tokens together."),
            "max_violation_batch": self._of_batches(),
            "gini": entry([load.gini(row) for row in counts], ["layer"], "0 to 1",
                baseline=np.mean([load.gini(row) for row in uniform]), baseline_is=UNIFORM, source="Gini coefficient",
                note="0 where all loads are the same, (E-1)/E where one expert has all."),
            "dead_experts": entry([len(one) for one in dead], ["layer"], "experts",
                baseline=np.mean([len(load.dead(row, _DEAD)) for row in uniform]), baseline_is=UNIFORM,
                source="experts with less than 1 % of the mean load", which=dead,
                note="Of this text: an expert may be alive in another one. `which` has their numbers."),
            "coverage": entry([load.coverage(row) if row.sum() else row * np.nan for row in counts],
                ["layer", "busiest"], "share", baseline=np.tile(np.arange(1, experts + 1) / experts, (len(counts), 1)),
                baseline_is=f"{CLOSED}: uniform loads", coordinates={"busiest": list(range(1, experts + 1))},
                source="Megatron-LM, tools/moe_routing/analyze_routing_concentration.py",
                note="share of all choices that the N busiest experts have."),
        }  # fmt: skip
        return found | ({"domain_specialisation": self._of_domains()} if len(self._domains) > 1 else {})

    def _nulls(self) -> str:
        real = (self._sizes * np.arange(len(self._sizes))).sum() / max(self._sizes.sum(), 1)
        return f"{real:.3g} real experts a token; null ones are left out. " if self._sizes[:-1].any() else ""

    def _uniform(self, share: float) -> np.ndarray:
        """[draws, E] loads of one layer of a uniform random router, of this share of the tokens."""
        sizes = self._sizes / len(self._about.layers) * share
        return chance.uniform_loads(np.rint(sizes).astype(np.int64), self._about.experts, seed=self._seed)

    def _of_batches(self) -> dict:
        number = int(self._batches_J.sum())
        tokens = self._sizes.sum() / len(self._about.layers)
        uniform = self._uniform(self._batch / tokens) if number else np.full((1, 1), np.nan)
        what = f"mean over {number} batches of {self._batch} tokens" if number else (
            f"the text has less than one batch of {self._batch} tokens")  # fmt: skip
        return entry(
            self._batches_JL.sum(0) / (number or np.nan),
            ["layer"],
            "share of mean load",
            baseline=np.mean([load.max_violation(row) for row in uniform]),
            baseline_is=UNIFORM,
            source=_LOSS_FREE,
            note=f"{what}; smaller batches have more by chance. Batches are neighbours in the text, as in no training.",
            batches=number,
            batch_tokens=self._batch,
        )

    def _of_domains(self) -> dict:
        counts, total = self._domain_DLE, self._domain_DLE.sum(2, keepdims=True)
        told = [[choices.dependence(one) for one in both.transpose(1, 0, 2)] for both in (counts, self._shuffled_DLE)]
        everything = self.counts_LE / np.maximum(self.counts_LE.sum(1, keepdims=True), 1)
        return entry(
            counts / np.where(total, total, np.nan),
            ["domain", "layer", "expert"],
            "share",
            baseline=np.broadcast_to(everything, counts.shape),
            baseline_is=f"{CLOSED}: the load of the layer, whatever the domain",
            source=_OLMOE,
            note="of the choices of a domain's tokens, each expert's share. `summary` [L]: `information`, nats, of "
            "domain and choice, and `value`, what a domain's K favourite experts have, mean over tokens; chance is the "
            "same with domains shuffled among the windows. Experts that are busy in all domains raise `value` alone.",
            coordinates={"domain": self._domains},
            tokens=self._tokens_D,
            summary={
                "information": told[0],
                "information_chance": told[1],
                "value": _favourites(counts, self._tokens_D, self._about.topk),
                "chance": _favourites(self._shuffled_DLE, self._shuffled_tokens_D, self._about.topk),
            },
        )

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        counts_BLE = np.tensordot(weights_BJ, self._counts_JLE, 1)
        found = {
            "max_violation_global": np.apply_along_axis(load.max_violation, 2, counts_BLE),
            "gini": np.apply_along_axis(load.gini, 2, counts_BLE),
        }
        if (self._batches_J > 0).all():
            found["max_violation_batch"] = (weights_BJ @ self._batches_JL) / (weights_BJ @ self._batches_J)[:, None]
        dead = (counts_BLE < _DEAD * counts_BLE.mean(2, keepdims=True)).sum(2)
        return {name: mean_over(values) for name, values in found.items()} | {"dead_experts": dead.sum(1)}


def _favourites(counts_DLE: np.ndarray, tokens_D: np.ndarray, k: int) -> np.ndarray:
    """[L]: :func:`..measures.specialisation.specialisation` of counts."""
    total = counts_DLE.sum(2, keepdims=True)
    shares = np.sort(counts_DLE / np.maximum(total, 1), axis=2)[:, :, -k:].sum(2)
    return (shares * tokens_D[:, None]).sum(0) / max(tokens_D.sum(), 1)
