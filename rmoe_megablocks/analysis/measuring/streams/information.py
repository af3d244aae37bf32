"""Mutual information between all pairs of layers, streamed.

:mod:`..measures.information` is the definition. A token's value is log E + mean_i (log c_i - log n_i - log m_i), so it
is enough to add up, for each pair of layers, the logarithms of c_i, how many scores share both bins with score i; a
layer beside itself has the n_i. Counts are multiplied before a logarithm is taken, as far as float64 holds the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import information
from rmoe_megablocks.analysis.measuring.entries import PAPER, SHUFFLED, entry, mean_over
from rmoe_megablocks.analysis.measuring.options import Options
from rmoe_megablocks.analysis.measuring.passes.pieces import CHUNK, Piece
from rmoe_megablocks.analysis.measuring.passes.sampling import Sample
from rmoe_megablocks.analysis.measuring.passes.survey import Survey

#: the bin of every float16, by its bits: what numpy.digitize finds
_BIN_OF_HALF = information.bins(np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)).astype(np.uint8)
_LARGEST = 2.0**1000  # products stay below what float64 holds
_KEPT_BYTES = 2**28  # of the tokens that are shuffled


def bins_of(half_TLE: np.ndarray) -> np.ndarray:
    """uint8 [E, L, T]: the bins of float16 scores, tokens last, so that what follows runs over neighbours in memory."""
    return np.ascontiguousarray(np.take(_BIN_OF_HALF, half_TLE.view(np.uint16)).transpose(2, 1, 0))


def masks_of(bins_ELT: np.ndarray) -> np.ndarray:
    """[words, E, L, T]: bit j of row i says whether scores i and j are in the same bin; the narrowest words that do."""
    experts = len(bins_ELT)
    dtype = next((kind for kind in (np.uint8, np.uint16, np.uint32) if experts <= 8 * kind().itemsize), np.uint64)
    width = 8 * dtype().itemsize
    masks = np.zeros((-(-experts // width), *bins_ELT.shape), dtype)
    for j in range(experts):
        word, bit = divmod(j, width)
        masks[word, j] |= dtype(1 << bit)
        for i in range(j):
            same = (bins_ELT[i] == bins_ELT[j]).astype(dtype)
            masks[word, i] |= same << dtype(bit)
            other, place = divmod(i, width)
            masks[other, j] |= same << dtype(place)
    return masks


class LogCounts:
    """Sum over tokens and scores of log c, c being how many bits two layers' masks share. Keeps its buffers."""

    def __init__(self, words: int, experts: int, tokens: int, dtype: np.dtype) -> None:
        self._tokens = tokens
        self._both = np.empty((experts, tokens), dtype)
        self._bits = np.empty((experts, tokens), np.uint8)
        self._count = np.empty((experts, tokens), np.uint8 if words == 1 else np.uint16)
        self._stages, rows, limit = [], experts, experts
        while rows > 1 and limit**2 <= _LARGEST:
            limit **= 2
            kind = next((one for one in (np.uint8, np.uint16, np.uint32) if limit <= np.iinfo(one).max), np.float64)
            self._stages.append(np.empty((rows - rows // 2, tokens), kind))
            rows -= rows // 2
        self._fold = 1  # tokens whose products are multiplied too
        while limit**2 <= _LARGEST and limit > 1:
            limit, self._fold = limit**2, 2 * self._fold

    def __call__(self, a_WET: np.ndarray, b_WET: np.ndarray) -> float:
        count = self._count
        for word, (a, b) in enumerate(zip(a_WET, b_WET, strict=True)):
            np.bitwise_and(a, b, out=self._both)
            if not word:
                np.bitwise_count(self._both, out=count if count.dtype == np.uint8 else self._bits)
                if count.dtype != np.uint8:
                    count[...] = self._bits
            else:
                count += np.bitwise_count(self._both, out=self._bits)
        found = count
        for stage in self._stages:
            half = len(found) // 2
            np.multiply(found[:half], found[half : 2 * half], out=stage[:half], dtype=stage.dtype)
            stage[half:] = found[2 * half :]
            found = stage
        whole = self._tokens // self._fold * self._fold
        folded = found[:, :whole].reshape(len(found), self._fold, -1).astype(np.float64)
        return float(
            np.log(np.multiply.reduce(folded, axis=1)).sum() + np.log(found[:, whole:], dtype=np.float64).sum()
        )


def log_counts(masks_a: np.ndarray, masks_b: np.ndarray | None = None) -> np.ndarray:
    """[L, L] of :class:`LogCounts` of [words, E, L, T]; of one argument with itself, which is symmetric."""
    other = masks_a if masks_b is None else masks_b
    words, experts, layers, tokens = masks_a.shape
    summed = LogCounts(words, experts, tokens, masks_a.dtype)
    result = np.zeros((layers, layers))
    for a in range(layers):
        for b in range(a if masks_b is None else 0, layers):
            result[a, b] = summed(masks_a[:, :, a], other[:, :, b])
            if masks_b is None:
                result[b, a] = result[a, b]
    return result


def between(logs_LL: np.ndarray, own_L: np.ndarray, tokens: np.ndarray | float, experts: int) -> np.ndarray:
    """The measure from sums of log c and, of each layer alone, of log n; leading axes as they come."""
    scale = np.maximum(np.asarray(tokens, np.float64), 1)[..., None, None] * experts
    return np.log(experts) + (logs_LL - own_L[..., :, None] - own_L[..., None, :]) / scale


class Information:
    """``mutual_information`` [L, L], and what shuffled tokens have.

    The baseline is of a sample of the whole text, shuffled: within a piece, tokens share a document and a domain.
    """

    def __init__(self, about: Any, found: Survey, options: Options) -> None:
        layers, experts, blocks, seed = len(about.layers), about.experts, found.blocks, options.seed
        self._experts = experts
        tokens = options.information_tokens
        self._sample = Sample(found.tokens, tokens, seed) if tokens else None
        kept = min(options.baseline_tokens, max(1, _KEPT_BYTES // (layers * experts)))
        self._kept = Sample(found.tokens, kept, seed + 1)
        self._seed = seed
        self._bins_ELR = np.empty((experts, layers, len(self._kept)), np.uint8)
        self._logs_JLL = np.zeros((blocks, layers, layers))
        self._tokens_J = np.zeros(blocks, np.int64)
        self._baseline: np.ndarray | None = None

    def add(self, piece: Piece) -> None:
        bins = bins_of(piece.half_TLE)
        rows, places = self._kept.within(piece.start, piece.stop)
        self._bins_ELR[:, :, places] = bins[:, :, rows]
        if self._sample is not None:
            bins = np.ascontiguousarray(bins[:, :, self._sample.within(piece.start, piece.stop)[0]])
        if bins.shape[-1]:
            self._logs_JLL[piece.block] += log_counts(masks_of(bins))
            self._tokens_J[piece.block] += bins.shape[-1]

    def baseline(self) -> np.ndarray:
        """[L, L] of the kept tokens beside themselves in another order."""
        if self._baseline is None:
            order = np.random.default_rng(self._seed).permutation(len(self._kept))
            layers = self._bins_ELR.shape[1]
            logs, own = np.zeros((layers, layers)), np.zeros(layers)
            for start in range(0, len(order), CHUNK):
                masks = masks_of(np.ascontiguousarray(self._bins_ELR[:, :, start : start + CHUNK]))
                other = masks_of(np.ascontiguousarray(self._bins_ELR[:, :, order[start : start + CHUNK]]))
                logs += log_counts(masks, other)
                summed = LogCounts(len(masks), self._experts, masks.shape[-1], masks.dtype)
                own += [summed(masks[:, :, layer], masks[:, :, layer]) for layer in range(layers)]
            self._baseline = between(logs, own, len(order), self._experts)
        return self._baseline

    def value(self, weights_BJ: np.ndarray) -> np.ndarray:
        """[B, L, L]."""
        logs = np.tensordot(weights_BJ, self._logs_JLL, 1)
        return between(logs, np.diagonal(logs, axis1=1, axis2=2), weights_BJ @ self._tokens_J, self._experts)

    def entries(self) -> dict:
        used = int(self._tokens_J.sum())
        return {
            "mutual_information": entry(
                self.value(np.ones((1, len(self._tokens_J))))[0],
                ["layer", "other_layer"],
                "nats",
                baseline=self.baseline(),
                baseline_is=SHUFFLED,
                source=f"{PAPER}: 100 bins of linspace(0, 1), mean over tokens",
                note=f"{used} tokens; baseline of {len(self._kept)}, drawn evenly and shuffled. The diagonal is a "
                "layer's entropy. Flat gates alone move the value, so read what is above the baseline.",
                tokens=used,
                baseline_tokens=len(self._kept),
            )
        }

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        layers = self._logs_JLL.shape[1]
        if layers < 2:
            return {}
        pairs = np.triu_indices(layers, 1)
        found = mean_over(self.value(weights_BJ)[:, pairs[0], pairs[1]])
        chance = self.baseline()
        symmetric = (chance + chance.T) / 2
        return {
            "mutual_information": found,
            "mutual_information_above_chance": found - float(symmetric[pairs].mean()),
        }
