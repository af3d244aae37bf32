"""The form of one measure in measures.json, and the figures of a measure that stand for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHUFFLED = "tokens shuffled"
UNIFORM = "uniform random router"
CLOSED = "closed form"
PAPER = "RMoE, section 5 (2408.06793)"


def entry(
    value: Any,
    axes: Sequence[str],
    unit: str,
    *,
    baseline: Any = None,
    baseline_is: str | None = None,
    source: str,
    note: str = "",
    coordinates: Mapping[str, Sequence] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A measure as measures.json has it: numbers and nested lists, None for what is no number.

    Args:
        value: array with ``axes``, or a mapping of names to numbers and lists (no axes then).
        baseline: what chance gives: of the same shape, or one number, or none.
        baseline_is: how it was had.
        coordinates: of an axis, the names of its places; a reader finds the layers' numbers and 0, 1, 2 otherwise.
        more: what else belongs to it.
    """
    found = {
        "value": value,
        "axes": list(axes),
        "unit": unit,
        "baseline": baseline,
        "baseline_is": baseline_is,
        "source": source,
        "note": note,
        "coordinates": dict(coordinates or {}),
    }
    return plain(found | more)


def plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, and None where a float is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def mean_over(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over layers of those that have the value; NaN, without a warning, where none has."""
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(axis)
    number = there.sum(axis)
    return np.where(number, total / np.maximum(number, 1), np.nan)
