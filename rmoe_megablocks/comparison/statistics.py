"""Means, paired differences and their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


class Difference(NamedTuple):
    """Of pairs with the same seed: the mean, its 95 % interval (None of one pair), and how many they are."""

    mean: float
    interval: tuple[float, float] | None
    pairs: int

    @property
    def verdict(self) -> str:
        """``lower`` or ``higher`` where the interval leaves out zero."""
        if self.interval is None:
            return "one pair: no interval"
        low, high = self.interval
        return "not distinguishable" if low <= 0 <= high else ("lower" if high < 0 else "higher")


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs over the seeds that both have; None where there is none."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    return Difference(statistics.fmean(differences), _interval(differences), len(differences))


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the mean. It cannot leave the range of what was seen: few seeds make it narrow."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)
