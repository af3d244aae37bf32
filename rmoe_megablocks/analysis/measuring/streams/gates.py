"""How gates look, layer by layer: balance, entropy, margin, and what the recurrent types recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import gates
from rmoe_megablocks.analysis.measuring.entries import CLOSED, PAPER, entry, mean_over
from rmoe_megablocks.analysis.measuring.passes.pieces import Piece
from rmoe_megablocks.analysis.measuring.streams.quantiles import Medians

_LEAST = np.float32(2.0**-24)  # the least float16 above 0: what a recorded score of 0 may have been
_MEANS = {
    "entropy": ("nats", "of all experts' scores; flat gates have ln E, one expert alone 0"),
    "margin": ("logits", "the K-th selection logit less the one after it, mean over tokens"),
    "state_norm": ("length", "of the router's state, mean over tokens"),
    "update_gate": ("share", "mean over state and tokens; near 1 the state is kept as it was"),
    "reset_gate": ("share", "mean over state and tokens; near 0 the former state is not looked at"),
}


class Gates:
    """``inside_balance``, ``outside_balance`` (medians), ``entropy``, ``margin``, ``state_norm``, ``update_gate``,
    ``reset_gate`` (means with standard deviations over tokens), [L] each."""

    def __init__(self, about: Any, blocks: int) -> None:
        layers = len(about.layers)
        self._about = about
        self._inside = Medians(blocks, layers, (0, 26))
        self._outside = Medians(blocks, layers, (-24, 8))
        self._tokens = 0
        self._chosen_L = np.zeros(layers, np.int64)
        self._sums: dict[str, np.ndarray] = {}
        self._blocks = blocks

    def add(self, piece: Piece) -> None:
        scores = piece.scores_TLE
        self._tokens += len(scores)
        # a score that float16 has no room for counts as the least it can hold: a ratio is then too small, not infinite
        self._inside.add(gates.inside_balance(np.maximum(scores, _LEAST)), piece.block)
        chosen = piece.choices_TLK
        self._chosen_L += (chosen >= 0).sum((0, 2))
        own = np.take_along_axis(scores, np.maximum(chosen, 0), axis=2)
        self._outside.add(np.where(chosen >= 0, own, 0).sum(-1), piece.block)
        for name, values in {"entropy": gates.entropy(scores), **piece.columns}.items():
            self._add(name, values.astype(np.float64), piece.block)

    def _add(self, name: str, values_TL: np.ndarray, block: int) -> None:
        if name not in self._sums:
            self._sums[name] = np.zeros((3, self._blocks, values_TL.shape[1]))
        there = np.isfinite(values_TL)
        values = np.where(there, values_TL, 0)
        self._sums[name][:, block] += there.sum(0), values.sum(0), (values**2).sum(0)

    def _mean(self, name: str, weights_BJ: np.ndarray) -> np.ndarray:
        number, total, _ = self._sums[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights_BJ @ total) / (weights_BJ @ number)

    def entries(self) -> dict:
        about, ones = self._about, np.ones((1, self._blocks))
        number = about.experts
        over = " Sigmoid scores are taken over their sum." if about.score_function == "sigmoid" else ""
        over = " Scores are taken over their sum over the real experts." if about.null_experts else over
        flat = f"{CLOSED}: flat gates"
        median = "median over tokens, to .4 % or better."
        inside = self._inside.median(ones)[0]
        chosen_L = self._chosen_L / self._tokens
        fewer = "" if (chosen_L == about.topk).all() else ", of as many real experts as a token chose on average"
        cut = " Float16 holds no score below 2^-24: a value of 2^24 x the best is a lower bound."
        found = {
            "inside_balance": entry(inside, ["layer"], "ratio", baseline=1.0, baseline_is=flat, source=PAPER,
                note="best score over the second, " + median + (cut if (inside > 2**20).any() else "")),
            "outside_balance": entry(self._outside.median(ones)[0], ["layer"], "share", baseline=chosen_L / number,
                baseline_is=flat + fewer, source=PAPER, note="sum of the selected scores, " + median + over),
        }  # fmt: skip
        for name, (unit, note) in _MEANS.items():
            if name not in self._sums:
                continue
            count, total, squares = self._sums[name].sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
            chance = {"baseline": float(np.log(number)), "baseline_is": flat} if name == "entropy" else {}
            extra = over if name == "entropy" else ""
            lacking = int(self._tokens - count.min())
            extra += f" {lacking} tokens of a layer have none and are left out." if lacking else ""
            found[name] = entry(self._mean(name, ones)[0], ["layer"], unit, **chance, source=f"{name} as recorded"
                if name != "entropy" else "Shannon entropy", note=note + "." + extra, sd=spread)  # fmt: skip
        return found

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        found = {
            "inside_balance": self._inside.median(weights_BJ),
            "outside_balance": self._outside.median(weights_BJ),
        } | {name: self._mean(name, weights_BJ) for name in _MEANS if name in self._sums}
        return {name: mean_over(values) for name, values in found.items()}
