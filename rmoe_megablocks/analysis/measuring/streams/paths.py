"""Sequences of best experts over the layers, counted without being kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measuring.entries import entry
from rmoe_megablocks.analysis.measuring.passes.pieces import Piece
from rmoe_megablocks.analysis.measuring.passes.sampling import Sample

_PENDING = 1_000_000  # paths that wait to be counted
_TOP = 10


class Counter:
    """How often each path occurs, by a hash of 64 bits, and the first row of each.

    The hash is a sum of the layers' experts times odd random numbers: of 10 million paths two have the same one with a
    chance below 10^-4.
    """

    def __init__(self, layers: int) -> None:
        random = np.random.default_rng(0).integers(2**63, size=layers, dtype=np.uint64)
        self._factors = random * np.uint64(2) + np.uint64(1)
        self.hashes = np.zeros(0, np.uint64)
        self.counts, self.firsts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, best_TL: np.ndarray, rows_T: np.ndarray) -> None:
        """Paths of these rows; -1 is an expert of its own."""
        hashes = ((best_TL + 1).astype(np.uint64) * self._factors).sum(1, dtype=np.uint64)
        self._pending.append((hashes, rows_T))
        self._waiting += len(hashes)
        if self._waiting >= _PENDING:
            self.merge()

    def merge(self) -> None:
        """Counts what waits."""
        hashes = np.concatenate([self.hashes, *(one for one, _ in self._pending)])
        firsts = np.concatenate([self.firsts, *(rows for _, rows in self._pending)])
        counts = np.concatenate([self.counts, np.ones(self._waiting, np.int64)])
        order = np.argsort(hashes, kind="stable")  # earlier rows stay ahead of later ones
        hashes = hashes[order]
        new = np.flatnonzero(np.diff(hashes, prepend=hashes[:1] + np.uint64(1)) != 0)
        self.hashes, self.firsts = hashes[new], firsts[order][new]
        self.counts = np.add.reduceat(counts[order], new) if len(new) else counts
        self._pending, self._waiting = [], 0

    def number(self) -> int:
        return len(self.counts)

    def entropy(self) -> float:
        """Nats, as counted."""
        shares = self.counts / self.counts.sum()
        return float(-(shares * np.log(shares)).sum())


class Paths:
    """``paths``: number, entropy, and the most frequent ones, which :meth:`look_up` reads once all is counted."""

    def __init__(self, about: Any, total: int, tokens: int, seed: int) -> None:
        layers = len(about.layers)
        self._about, self._seed = about, seed
        self._sample = Sample(total, tokens, seed)
        self._counter = Counter(layers)
        self._loads_LE = np.zeros((layers, about.experts + 1), np.int64)  # of best experts, the first column is none
        self._top = np.zeros((0, layers), np.int64)
        self._shares = np.zeros(0)

    def add(self, piece: Piece) -> None:
        rows, _ = self._sample.within(piece.start, piece.stop)
        best = piece.choices_TLK[rows, :, 0]
        self._counter.add(best, rows + piece.start)
        for layer, counts in enumerate(self._loads_LE):
            counts += np.bincount(best[:, layer] + 1, minlength=len(counts))

    def look_up(self, recording: Any) -> None:
        """Reads the most frequent paths where each occurs first."""
        self._counter.merge()
        order = np.argsort(-self._counter.counts, kind="stable")[:_TOP]
        rows = self._counter.firsts[order]
        found, start = {}, 0
        for batch in recording.batches(columns=["choices"]):
            stop = start + len(batch.choices_TLK)
            for row in rows[(rows >= start) & (rows < stop)].tolist():
                found[row] = np.asarray(batch.choices_TLK[row - start, :, 0]).astype(np.int64)
            start = stop
            if len(found) == len(rows):
                break
        self._top = np.array([found[row] for row in rows.tolist()])
        self._shares = self._counter.counts[order] / len(self._sample)

    def entries(self) -> dict:
        other = self._independent()
        return {
            "paths": entry(
                {
                    "number": self._counter.number(),
                    "entropy": self._counter.entropy(),
                    "top": self._top,
                    "shares": self._shares,
                },
                [],
                "nats",
                baseline={"number": other.number(), "entropy": other.entropy()},
                baseline_is="layers that choose on their own, each with its loads; as many tokens",
                source="sequences of best experts (PathMoE, 2603.18297)",
                note=f"{len(self._sample)} tokens. Number and entropy grow with the tokens, so compare only recordings "
                "of as many. -1 is a layer whose best choice is a null expert.",
                tokens=len(self._sample),
            )
        }

    def _independent(self) -> Counter:
        """Paths of as many tokens whose layers know nothing of each other."""
        generator = np.random.default_rng(self._seed)
        result = Counter(len(self._loads_LE))
        shares = self._loads_LE / self._loads_LE.sum(1, keepdims=True)
        number = self._loads_LE.shape[1]
        for start in range(0, len(self._sample), _PENDING):
            tokens = min(_PENDING, len(self._sample) - start)
            best = np.stack([generator.choice(number, tokens, p=row) - 1 for row in shares], axis=1)
            result.add(best, np.arange(start, start + tokens))
        result.merge()
        return result

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        return {}
