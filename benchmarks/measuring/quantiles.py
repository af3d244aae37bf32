"""Quantiles, ratios of what was timed in turn, and how sure their medians are."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_RESAMPLES = 4_000


@dataclass(frozen=True)
class Estimate:
    """A median with the ends of its interval, which are NaN where there is none."""

    median: float
    low: float
    high: float

    def text(self, form: str = ".3f") -> str:
        """As "1.012 (1.009 to 1.016)"."""
        if math.isnan(self.low):
            return f"{self.median:{form}}"
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, linearly between neighbours."""
    return tuple(float(value) for value in np.quantile(values, (0.2, 0.5, 0.8)))


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round, turned round every other time: A B, B A, A B; of three A B C, C B A.

    So that neither a machine whose speed drifts nor what the one before leaves in the caches favours any.
    """
    for index in range(rounds):
        yield list(names)[:: 1 if index % 2 == 0 else -1]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Pair by pair: of one round, in which both had the same machine."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Pair by pair, as :func:`ratios`."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median with its 95 % interval by the percentile bootstrap; none of a single value."""
    return _estimate(tuple(values), seed)


@functools.lru_cache(maxsize=4096)  # tables ask for the same one several times
def _estimate(values: tuple[float, ...], seed: int) -> Estimate:
    if len(values) < 2:
        return Estimate(float(np.median(values)), math.nan, math.nan)
    return Estimate(float(np.median(values)), *_ends(_resampled(values, seed)))


def slope(deep: Sequence[float], shallow: Sequence[float], steps: int, seed: int = 0) -> Estimate:
    """What each of ``steps`` more adds: (median of ``deep`` - median of ``shallow``) / steps, with its interval.

    The two are resampled on their own: they were not measured in pairs.
    """
    resampled = (_resampled(deep, seed) - _resampled(shallow, seed + 1)) / steps
    return Estimate(float(np.median(deep) - np.median(shallow)) / steps, *_ends(resampled))


def why_no_verdict(control: Estimate, tolerance: float) -> str | None:
    """Why a ratio measured as ``control``, of two that are the same, was proves nothing; None if it does."""
    if math.isnan(control.low):
        return "the control has no interval"
    if not control.low <= 1 <= control.high:
        return f"the control, {control.text('.4f')}, leaves out 1"
    if abs(control.median - 1) > tolerance:
        return f"the control, {control.text('.4f')}, is off by more than {tolerance:.1%}"
    return None


def _resampled(values: Sequence[float], seed: int) -> np.ndarray:
    """Medians of samples drawn from ``values`` with replacement."""
    generator = np.random.default_rng(seed)
    return np.median(generator.choice(np.asarray(values), (_RESAMPLES, len(values))), axis=1)


def _ends(medians: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
