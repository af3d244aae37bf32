"""Figures of several models side by side, with differences and their intervals, in 80 columns."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas

from rmoe_megablocks.analysis.measuring.comparing import groups as grouping
from rmoe_megablocks.analysis.measuring.figures import TITLES
from rmoe_megablocks.comparison.statistics import paired, spread
from rmoe_megablocks.errors import UsageError

SEEDS = (
    "Means over layers; ± is the sample standard deviation over seeds. Differences to {baseline} are means over pairs "
    "of one seed, with the 95 % percentile bootstrap interval over seeds, which few seeds make too narrow; none of one "
    "pair. "
)
WINDOWS = (
    "Means over layers, one seed a model. Differences to {baseline} have the 95 % basic bootstrap interval over "
    "{blocks} contiguous blocks of the text's windows, {pairs}: how sure the figure is of these trained models on text "
    "like this. It does not show how much another seed of the same router would differ, which only runs with several "
    "seeds do. "
)
_BOTH = (
    "Where it covers 0 the two are not distinguishable; of {figures} figures one in twenty leaves out 0 by chance. "
    "Figures without an interval are of weights, or of tables that blocks are too short for. `chance` is what no "
    "routing by tokens gives (docs/analysis.md)."
)


class Comparison(NamedTuple):
    """What was compared.

    Attributes:
        frame: a row a figure and group: figure, title, group, seeds, value, sd, chance, difference, low, high, over.
        labels: of the groups, the baseline first.
        warnings: what else differs.
        note: how to read it.
    """

    frame: pandas.DataFrame
    labels: list[str]
    warnings: list[str]
    note: str

    def text(self) -> str:
        """80 columns wide: :meth:`table`, warnings, and how to read it."""
        told = [_folded(self.note), *(_folded(f"Warning: {one}.") for one in self.warnings)]
        return "\n\n".join([self.table(), *told]) + "\n"

    def table(self) -> str:
        """Groups and figures."""
        return _table(self)


def compare(measured: Sequence[Mapping[str, Any]], baseline: str | None = None) -> Comparison:
    """Measured recordings side by side: over seeds where a group has several, else over windows.

    Args:
        measured: what ``measure`` returns, or ``files.read``.
        baseline: the label that others are held against (default: linear where there is one, else the first).

    Raises:
        UsageError: fewer than two groups, two recordings of one name, or a baseline that is none of the labels.
    """
    of_label = grouping.grouped(measured)
    if len(of_label) < 2:
        raise UsageError(
            f"compare: all recordings are seeds of one setting ({next(iter(of_label))}): nothing to compare"
        )
    if baseline is None:
        baseline = "linear" if "linear" in of_label else next(iter(of_label))
    if baseline not in of_label:
        raise UsageError(f"--baseline {baseline}: the groups are {'; '.join(of_label)}")
    of_label = {baseline: of_label.pop(baseline), **of_label}
    over_seeds = any(len(group) > 1 for group in of_label.values())
    is_paired = grouping.same_text(measured)
    rows = []
    for figure in TITLES:
        for label, group in of_label.items():
            if any(_of(figure, part) for part in of_label.values()):
                rows.append(_row(figure, label, group, of_label[baseline], over_seeds, is_paired))
    frame = pandas.DataFrame(rows)
    blocks = sorted({one["bootstrap"]["blocks"] for one in measured})
    note = (SEEDS if over_seeds else WINDOWS) + _BOTH
    filled = note.format(
        baseline=baseline,
        blocks=" or ".join(map(str, blocks)),
        pairs="drawn for all models together" if is_paired else "drawn for each model, as their texts differ",
        figures=frame["figure"].nunique(),
    )
    return Comparison(frame, list(of_label), grouping.warnings(of_label, is_paired), filled)


def _row(
    figure: str, label: str, group: Sequence, baseline: Sequence, over_seeds: bool, is_paired: bool
) -> dict[str, Any]:
    ours, theirs = (_values(figure, one) for one in (group, baseline))
    value, sd = spread(list(ours.values())) if ours else (math.nan, None)
    chances = [one["figures"][figure]["chance"] for one in group if figure in one["figures"]]
    row: dict[str, Any] = {
        "figure": figure,
        "title": TITLES[figure],
        "group": label,
        "seeds": len(ours),
        "value": value,
        "sd": sd,
        "chance": float(np.mean(chances)) if chances and None not in chances else None,
        "difference": None,
        "low": None,
        "high": None,
        "over": None,
    }
    if group is baseline:
        return row
    if over_seeds:
        by_seed = ({grouping.seed(one): value for one, value in _of(figure, part)} for part in (group, baseline))
        if found := paired(*by_seed):
            low, high = found.interval or (None, None)
            row |= {"difference": found.mean, "low": low, "high": high, "over": f"{found.pairs} seeds"}
    elif ours and theirs:
        row["difference"] = value - next(iter(theirs.values()))
        if interval := _over_windows(figure, group[0], baseline[0], row["difference"], is_paired):
            row |= {"low": interval[0], "high": interval[1], "over": "windows"}
    return row


def _of(figure: str, group: Sequence[Mapping]) -> list[tuple[Mapping, float]]:
    found = [(one, one["figures"].get(figure, {}).get("value")) for one in group]
    return [(one, value) for one, value in found if value is not None]


def _values(figure: str, group: Sequence[Mapping]) -> dict[str, float]:
    return {one["recording"]["name"]: value for one, value in _of(figure, group)}


def _over_windows(
    figure: str, ours: Mapping, theirs: Mapping, difference: float, is_paired: bool
) -> tuple[float, float] | None:
    """95 % basic bootstrap: 2 x the difference less the percentiles. Resampling blocks makes a largest load larger than
    it is, and this takes that off again."""
    drawn = [one["bootstrap"]["values"].get(figure) for one in (ours, theirs)]
    if None in drawn:
        return None
    a, b = (np.array(values, dtype=np.float64) for values in drawn)
    if not is_paired:
        b = np.random.default_rng(0).permutation(b)
    size = min(len(a), len(b))
    differences = a[:size] - b[:size]
    differences = differences[np.isfinite(differences)]
    if not len(differences):
        return None
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(2 * difference - high), float(2 * difference - low)


def _table(found: Comparison) -> str:
    from tabulate import tabulate

    letters = dict(zip(found.labels, string.ascii_uppercase, strict=False))
    lines = [f"{letters[label]} = {_cut(label, 70)}" for label in found.labels]
    rows, before = [], None
    for row in found.frame.to_dict("records"):
        value = _number(row["value"]) + (f" ± {_number(row['sd'])}" if pandas.notna(row["sd"]) else "")
        rows.append(
            [
                row["title"] if row["title"] != before else "",
                letters[row["group"]],
                value,
                _number(row["chance"]) if pandas.notna(row["chance"]) else "",
                _difference(row),
            ]
        )
        before = row["title"]
    head = ["mean over layers", "", "value", "chance", f"less {letters[found.labels[0]]} [95 %]"]
    table = tabulate(rows, head, tablefmt="simple", disable_numparse=True)
    return "\n".join(lines) + "\n\n" + table


def _difference(row: Mapping) -> str:
    if pandas.isna(row["difference"]):
        return ""
    interval = f" [{_number(row['low'], '+')}, {_number(row['high'], '+')}]" if pandas.notna(row["low"]) else ""
    return _number(row["difference"], "+") + interval


def _number(value: float, sign: str = "") -> str:
    """Seven characters at most, with a sign."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size < 1e-12:  # what is left of two equal sums
        value = size = 0.0
    if size and size < 0.001:
        return f"{value:{sign}.0e}"
    if size >= 10_000:
        return f"{value:{sign}.1e}"
    return f"{value:{sign}.{3 if size < 100 else 1 if size < 1000 else 0}f}"


def _cut(label: str, width: int) -> str:
    return label if len(label) <= width else f"{label[: width - 3]}..."


def _folded(words: str) -> str:
    return textwrap.fill(words, 80, break_long_words=False, break_on_hyphens=False)
