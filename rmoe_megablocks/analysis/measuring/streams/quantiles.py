"""Medians of a stream."""

from __future__ import annotations

import numpy as np

_SHIFT = 15  # of a float32's 23 bits of mantissa 8 are kept: 256 bins an octave


class Medians:
    """Medians of positive float32 values, [blocks, layers] streams of them, from counts of narrow bins.

    A bin is 1/256 of an octave wide, and its least and largest value are kept: the median of a bin's values is taken
    between those as if they lay evenly, so that it is exact where a bin's values are all the same, and never further
    off than .4 %.

    Args:
        octaves: powers of two from which and to which there are bins; what is outside counts in the outermost.
    """

    def __init__(self, blocks: int, layers: int, octaves: tuple[int, int]) -> None:
        low, high = ((octave + 127) << (23 - _SHIFT) for octave in octaves)
        self._low, bins = low, high - low
        self._counts_JLB = np.zeros((blocks, layers, bins), np.int32)
        self._least_LB = np.full((layers, bins), np.inf, np.float32)
        self._most_LB = np.full((layers, bins), -np.inf, np.float32)

    def add(self, values_TL: np.ndarray, block: int) -> None:
        layers, bins = self._least_LB.shape
        values = np.ascontiguousarray(values_TL, np.float32)
        index = (values.view(np.int32) >> _SHIFT) - self._low
        flat = (np.clip(index, 0, bins - 1) + np.arange(layers, dtype=np.int32) * bins).ravel()
        counts = np.bincount(flat, minlength=layers * bins)
        self._counts_JLB[block] += counts.reshape(layers, bins).astype(np.int32)
        np.minimum.at(self._least_LB.reshape(-1), flat, values.ravel())
        np.maximum.at(self._most_LB.reshape(-1), flat, values.ravel())

    def median(self, weights_BJ: np.ndarray) -> np.ndarray:
        """[B, L] of the blocks taken as often as ``weights_BJ`` says."""
        blocks, layers, _ = self._counts_JLB.shape
        result = np.full((len(weights_BJ), layers), np.nan)
        for layer in range(layers):
            counts_JB = self._counts_JLB[:, layer]
            bins = np.flatnonzero(counts_JB.any(0))
            upto = np.cumsum(weights_BJ @ counts_JB[:, bins].astype(np.float64), axis=1)
            total = upto[:, -1]
            ends = [
                self._at(rank, upto, self._least_LB[layer, bins], self._most_LB[layer, bins])
                for rank in (np.floor((total - 1) / 2), np.ceil((total - 1) / 2))
            ]
            result[:, layer] = (ends[0] + ends[1]) / 2
        return result

    @staticmethod
    def _at(rank_B: np.ndarray, upto_BN: np.ndarray, least_N: np.ndarray, most_N: np.ndarray) -> np.ndarray:
        """The value of this rank, from 0 on."""
        place = (upto_BN <= rank_B[:, None]).sum(1)
        rows = np.arange(len(rank_B))
        before = np.where(place > 0, upto_BN[rows, place - 1], 0)
        inside = upto_BN[rows, place] - before
        share = (rank_B - before) / np.maximum(inside - 1, 1)
        return least_N[place] + share * (most_N[place].astype(np.float64) - least_N[place])
