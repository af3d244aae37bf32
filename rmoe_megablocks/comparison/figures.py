"""Learning curves: the mean over seeds with a band of one standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import pandas

from rmoe_megablocks.comparison.runs import Run

AXES = {"iteration": "iteration", "tokens": "tokens", "hours": "hours of training"}
_FEW = 20  # points of a curve that is shown whole
_POINTS = 100  # of a training curve: means of as many stretches


def curves(groups: Mapping[str, Sequence[Run]], axis: str) -> dict[str, pandas.DataFrame]:
    """By kind, a row a point: group, seed, x, loss. Every run of a group has its points at the same iterations."""
    rows: dict[str, list[dict]] = {"train": [], "valid": []}
    for label, runs in groups.items():
        for run in runs:
            train = run.of_kind("train")
            places = _places(train, axis)
            width = max(1, len(train) // _POINTS)
            for i in range(0, len(train) - width + 1, width):
                losses = [record["lm_loss"] for record in train[i : i + width] if record["lm_loss"] is not None]
                if losses:
                    last = train[i + width - 1]["iteration"]
                    rows["train"].append(
                        {"group": label, "seed": run.seed, "x": places[last], "loss": sum(losses) / len(losses)}
                    )
            rows["valid"] += [
                {"group": label, "seed": run.seed, "x": places[record["iteration"]], "loss": record["lm_loss"]}
                for record in run.of_kind("valid")
                if record["iteration"] in places
            ]
    return {kind: _together(pandas.DataFrame(points)) for kind, points in rows.items() if points}


def _places(train: Sequence[Mapping], axis: str) -> dict[int, float]:
    """Where an iteration lies on the axis."""
    if axis == "iteration":
        return {record["iteration"]: record["iteration"] for record in train}
    unit = 1 if axis == "tokens" else 3600
    totals = accumulate(record["tokens" if axis == "tokens" else "seconds"] / unit for record in train)
    return dict(zip((record["iteration"] for record in train), totals, strict=True))


def _together(points: pandas.DataFrame) -> pandas.DataFrame:
    """The n-th points of a group's runs at their mean x: hours differ from run to run, and bands need common places."""
    points["n"] = points.groupby(["group", "seed"]).cumcount()
    points["x"] = points.groupby(["group", "n"])["x"].transform("mean")
    return points


def draw(found: Mapping[str, pandas.DataFrame], axis: str, stem: Path) -> list[Path]:
    """Writes ``stem``.png and .svg; one panel a kind. Returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot, ticker

    seaborn.set_theme(style="whitegrid", palette="colorblind")
    chart, panels = pyplot.subplots(1, len(found), figsize=(6.0 * len(found), 4.2), squeeze=False, layout="constrained")
    titles = {"train": "training", "valid": "validation"}
    for panel, (kind, points) in zip(panels[0], found.items(), strict=True):
        seaborn.lineplot(points, x="x", y="loss", hue="group", errorbar="sd", ax=panel)
        panel.set(xlabel=AXES[axis], ylabel="loss, nats a token", title=titles[kind])
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=axis != "hours"))
        if points["n"].max() > _FEW:
            panel.set_ylim(top=_top(points))
        handles, labels = panel.get_legend_handles_labels()
        panel.get_legend().remove()
    seeds = points.groupby("group")["seed"].nunique()
    named = [f"{label} (n = {seeds[label]})" for label in labels]
    title = "mean and band of one standard deviation over n seeds"
    chart.legend(handles, named, title=title, loc="outside lower center", ncols=min(len(named), 4))
    written = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in written:
        chart.savefig(path, dpi=150)
    pyplot.close(chart)
    return written


def _top(points: pandas.DataFrame) -> float:
    """The first steps fall from ln(vocabulary): left out above, so that the differences of the rest are seen."""
    late = points[points["n"] >= points["n"].max() * 0.1]["loss"]
    return float(late.max() + 0.05 * (late.max() - points["loss"].min()))
