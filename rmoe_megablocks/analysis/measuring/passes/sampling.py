"""Which rows of a recording are looked at, and labels in another order, without holding the recording."""

from __future__ import annotations

import numpy as np


class Sample:
    """``size`` rows of ``total``, each set alike likely, in the order of the text; all of them where they are fewer."""

    def __init__(self, total: int, size: int, seed: int) -> None:
        if size >= total:
            self.rows = np.arange(total)
        else:
            self.rows = np.sort(np.random.default_rng(seed).choice(total, size, replace=False, shuffle=False))

    def __len__(self) -> int:
        return len(self.rows)

    def within(self, start: int, stop: int) -> tuple[np.ndarray, slice]:
        """The sampled rows from ``start`` to ``stop - 1``, counted from ``start``, and where they are in the sample."""
        low, high = np.searchsorted(self.rows, (start, stop))
        return self.rows[low:high] - start, slice(int(low), int(high))


class Deck:
    """Labels in an order in which all permutations are alike likely, dealt a part at a time.

    The labels are known by how many there are of each: a part's are drawn without replacement from those that are
    left (multivariate hypergeometric), so that the whole is one permutation and memory is that of the counts.

    Args:
        counts_V: how many of each label; fewer than 10^9 in all.
    """

    LARGEST = 10**9 - 1  # numpy's limit

    def __init__(self, counts_V: np.ndarray, seed: int) -> None:
        self._left = np.asarray(counts_V, np.int64).copy()
        self._generator = np.random.default_rng(seed)

    def deal(self, number: int) -> np.ndarray:
        """[number] labels."""
        drawn = self._generator.multivariate_hypergeometric(self._left, number, method="marginals")
        self._left -= drawn
        dealt = np.repeat(np.arange(len(drawn)), drawn)
        self._generator.shuffle(dealt)
        return dealt
