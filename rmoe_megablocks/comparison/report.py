"""The tables of a comparison, as data frames and as Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence

import pandas

from rmoe_megablocks.comparison import cost
from rmoe_megablocks.comparison.runs import Run
from rmoe_megablocks.comparison.statistics import paired, spread
from rmoe_megablocks.errors import UsageError

_NOTE = (
    "Bits per character or byte (bpc), lower is better: mean ± sample standard deviation over seeds. Differences to "
    "{baseline} are means over pairs of one seed, with the 95 % percentile bootstrap interval, which few seeds make "
    "too narrow: it cannot leave the range of what was seen. Where it covers 0 the two are not distinguishable."
)
_COST_NOTE = (
    "Parameters and training FLOPs by the planner; ms an iteration is the median of a run, its first tenth left out, "
    "then over seeds; ratios to {baseline} are medians over pairs of one seed. Time and memory mean something only "
    "where runs had the same machine to themselves."
)


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """The figures of summary.json that every run has. Raises UsageError without one."""
    found = [name for name in ("test_bpc", "valid_bpc") if all(run.figure(name) is not None for run in runs)]
    if not found:
        lacking = next(run for run in runs if run.figure("test_bpc") is None)
        raise UsageError(f"{lacking.folder}: summary.json has neither test_bpc nor valid_bpc of a finished evaluation")
    return found


def results(groups: Mapping[str, Sequence[Run]], baseline: str, metrics: Sequence[str]) -> pandas.DataFrame:
    """A row a group: seeds, and for each metric mean, deviation, difference, interval, pairs and verdict."""
    rows = []
    for label, runs in groups.items():
        row: dict[str, object] = {"group": label, "seeds": ", ".join(str(run.seed) for run in runs)}
        for metric in metrics:
            ours, theirs = _by_seed(runs, metric), _by_seed(groups[baseline], metric)
            row[metric], row[f"{metric}_sd"] = spread(list(ours.values()))
            found = None if label == baseline else paired(ours, theirs)
            low, high = (found and found.interval) or (None, None)
            row |= {
                f"{metric}_difference": found and found.mean,
                f"{metric}_low": low,
                f"{metric}_high": high,
                f"{metric}_pairs": found.pairs if found else 0,
                f"{metric}_verdict": "baseline" if label == baseline else found.verdict if found else "no pair",
            }
        rows.append(row)
    return pandas.DataFrame(rows)


def _by_seed(runs: Sequence[Run], metric: str) -> dict[int, float]:
    return {run.seed: run.figure(metric) for run in runs}


def of_runs(groups: Mapping[str, Sequence[Run]], metrics: Sequence[str]) -> pandas.DataFrame:
    """A row a run."""
    return pandas.DataFrame(
        {"group": label, "run": run.name, "seed": run.seed, "iterations": run.summary["iterations"]}
        | {metric: run.figure(metric) for metric in metrics}
        | {"tokens": cost.tokens(run), "ms_per_iteration": 1e3 * cost.seconds_per_iteration(run)}
        | {"peak_memory_bytes": cost.peak_memory(run)}
        for label, runs in groups.items()
        for run in runs
    )


def costs(groups: Mapping[str, Sequence[Run]], baseline: str) -> tuple[pandas.DataFrame, list[str]]:
    """A row a group, and a line for each that could not be planned."""
    rows, told = [], []
    speed = {label: {run.seed: cost.seconds_per_iteration(run) for run in runs} for label, runs in groups.items()}
    memory = {label: {run.seed: cost.peak_memory(run) for run in runs} for label, runs in groups.items()}
    for label, runs in groups.items():
        row: dict[str, object] = {"group": label, "tokens": cost.tokens(runs[0])}
        try:
            plan = cost.planned(runs[0])
        except UsageError as error:
            told.append(f"{label}: not planned ({error})")
        else:
            row |= {"parameters": plan.parameters, "active": plan.active, "router": plan.routing}
            row |= {"flops_per_token": plan.flops, "training_flops": plan.flops * row["tokens"]}
        row["ms_per_iteration"] = 1e3 * statistics.median(speed[label].values())
        row["time_ratio"] = _ratio(speed[label], speed[baseline])
        row["peak_mib"] = statistics.median(memory[label].values()) / 2**20 if all(memory[label].values()) else None
        row["memory_ratio"] = _ratio(memory[label], memory[baseline])
        rows.append(row)
    return pandas.DataFrame(rows), told


def _ratio(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> float | None:
    seeds = sorted(seed for seed in ours.keys() & theirs.keys() if ours[seed] and theirs[seed])
    return cost.ratio([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


def markdown(
    found: pandas.DataFrame, taken: pandas.DataFrame, baseline: str, metrics: Sequence[str], told: Sequence[str]
) -> str:
    """The tables, 80 columns wide where labels are short, with what a reader must know of them."""
    parts = []
    for metric in metrics:
        shown = found[["group", "seeds"]].copy()
        shown[metric.replace("_", " ")] = [_spread(row[metric], row[f"{metric}_sd"]) for _, row in found.iterrows()]
        shown[f"less {baseline}"] = [_difference(row, metric) for _, row in found.iterrows()]
        shown["verdict"] = found[f"{metric}_verdict"]
        parts.append(_table(shown))
    parts.append(_folded(_NOTE.format(baseline=baseline)))
    for columns in (_PLANNED, _MEASURED):
        shown = taken[["group"]].copy()
        for column, (title, form) in columns.items():
            if column in taken:
                shown[title] = [format(value, form) if pandas.notna(value) else "-" for value in taken[column]]
        parts.append(_table(shown, "right"))
    parts.append(_folded(_COST_NOTE.format(baseline=baseline)))
    parts += [_folded(f"**Warning:** {line}.") for line in told]
    return "\n\n".join(parts) + "\n"


_PLANNED = {
    "parameters": ("parameters", ",.0f"),
    "active": ("active", ",.0f"),
    "router": ("router", ",.0f"),
    "flops_per_token": ("FLOP a token", ".3g"),
    "training_flops": ("FLOP in all", ".3g"),
}
_MEASURED = {
    "tokens": ("tokens", ",.0f"),
    "ms_per_iteration": ("ms an iteration", ",.1f"),
    "time_ratio": ("time ratio", ".3f"),
    "peak_mib": ("peak MiB", ",.0f"),
    "memory_ratio": ("memory ratio", ".3f"),
}


def _table(frame: pandas.DataFrame, align: str = "left") -> str:
    return frame.to_markdown(index=False, disable_numparse=True, colalign=["left", *[align] * (frame.shape[1] - 1)])


def _folded(text: str) -> str:
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" + (f" ± {deviation:.4f}" if pandas.notna(deviation) else "")


def _difference(row: pandas.Series, metric: str) -> str:
    difference, low, high = (row[f"{metric}_{name}"] for name in ("difference", "low", "high"))
    if pandas.isna(difference):
        return ""
    return f"{difference:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if pandas.notna(low) else "")
