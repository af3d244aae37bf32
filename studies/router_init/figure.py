"""Curves of the loss and of the router's entropy, a line an arm: mean over seeds, and every seed thinly."""

import json
import statistics
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from studies.router_init import arms, report


def draw(folder: Path, found: dict[arms.Name, dict], file: Path) -> None:
    """Writes ``file``. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--figure needs matplotlib: pip install 'rmoe-megablocks[studies]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, (losses, entropies) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for number, label in enumerate(dict.fromkeys(name.labelled for name in found)):
        names = [name for name in found if name.labelled == label]
        for axes, curve in ((losses, _valid), (entropies, _entropy)):
            curves = [curve(folder / str(name)) for name in names]
            for points in curves:
                axes.plot(*zip(*points.items(), strict=True), color=f"C{number % 10}", alpha=0.25, linewidth=0.7)
            common = [x for x in curves[0] if all(x in points for points in curves)]
            means = [statistics.fmean(points[x] for points in curves) for x in common]
            axes.plot(common, means, color=f"C{number % 10}", label=label)
    losses.set(xlabel="iteration", ylabel="validation loss, nats a token")
    entropies.set(xlabel="iteration", ylabel="router's entropy, nats, mean over layers")
    losses.legend(fontsize="small")
    chart.tight_layout()
    chart.savefig(file, dpi=150)
    pyplot.close(chart)


def _valid(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["iteration"]: record["lm_loss"] for record in records if record["kind"] == "valid"}


def _entropy(folder: Path) -> dict[int, float]:
    return {i: statistics.fmean(told["router_entropy"]) for i, told in report.routing(folder).items()}
