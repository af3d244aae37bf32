"""What a run takes: parameters and FLOPs by the planner, time and memory as measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rmoe_megablocks.comparison.runs import Run
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import load_config, merge, to_argv

_WARM_UP = 0.1  # share of a run's first iterations that its speed leaves out


@dataclass(frozen=True)
class Planned:
    """Parameters (all, those active for a token, the router's), and training FLOPs a token."""

    parameters: int
    active: int
    routing: int
    flops: float


def planned(run: Run) -> Planned:
    """By ``rmoe plan`` of the run's config.yaml. Raises UsageError where it cannot be planned."""
    from rmoe_megablocks.planning.counts import flops, parameters
    from rmoe_megablocks.planning.settings import is_argument, read_settings

    path = run.folder / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    settings = read_settings(merge(to_argv(load_config(path).arguments), [], is_argument))
    counts = parameters.model(settings)
    return Planned(counts.total, parameters.active(settings), counts.routing, flops.flops(settings).training)


def tokens(run: Run) -> int:
    """Trained on."""
    return sum(record["tokens"] for record in run.of_kind("train"))


def seconds_per_iteration(run: Run) -> float:
    """Median, the first tenth of the run left out."""
    told = [record["seconds"] for record in run.of_kind("train")]
    return statistics.median(told[int(len(told) * _WARM_UP) :])


def peak_memory(run: Run) -> float | None:
    """Bytes of the largest process."""
    return run.summary.get("peak_memory_bytes")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
