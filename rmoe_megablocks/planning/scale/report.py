"""The estimate from node to node, as a table and as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.planning.report import table
from rmoe_megablocks.planning.scale.cost import StepTime
from rmoe_megablocks.planning.scale.hardware import Hardware
from rmoe_megablocks.planning.scale.search import Found


class Pair:
    """The configured model and the same with the host's router in the same layout."""

    def __init__(self, found: Found, plain: StepTime) -> None:
        self.found, self.plain = found, plain

    @property
    def overhead(self) -> float:
        """Of the step time, for the router."""
        return self.found.time.total / self.plain.total - 1


def text(name: str, machine: Hardware, pairs: Sequence[Pair], missing: Sequence[str]) -> str:
    """Lines for a terminal."""
    rows = [("nodes", "GPUs", "batch", "s/step", "over", "router", "state", "shared", "bubble", "other", "MFU")]
    for pair in pairs:
        time, found = pair.found.time, pair.found
        parts = (time.routing, time.state, time.shared, time.bubble, time.tensor + time.expert + time.data)
        rows.append(
            (
                str(found.nodes),
                f"{found.world_size:,}",
                f"{found.settings.global_batch_size:,}",
                f"{time.total:.3g}",
                f"{100 * pair.overhead:+.2f}",
                *(f"{100 * part / time.total:.2f}" for part in parts),
                f"{100 * _utilisation(found, machine):.0f}",
            )
        )
    about = (
        f"{name} on {machine.name}: estimates, no GPU was asked. {machine.compute:.0%} of {machine.flops / 1e12:g} "
        f"TFLOP/s; {machine.reached:.0%} of {machine.bandwidth / 1e12:g} TB/s memory, {machine.link / 1e9:g} GB/s in a "
        f"node and {machine.network / 1e9:g} GB/s between nodes."
    )
    meaning = (
        "batch: sequences a step. In per cent: over: what this step takes more than one with the host's own router in "
        "the same layout. Of the step: the router's passes; what the state adds to waiting for pipeline messages; "
        "adding the gradients of what layers share over the stages; waiting for other stages; other messages; model "
        "FLOPs over the peak."
    )
    lines = [textwrap.fill(about, 80), "", table(rows), "", textwrap.fill(meaning, 80), ""]
    lines += [f"{pair.found.nodes:>6} nodes: {pair.found.layout}" for pair in pairs]
    return "\n".join([*lines, *(f"warning: {line}" for line in missing)])


def as_dict(pair: Pair) -> dict:
    """As ``--json`` prints it: seconds, bytes."""
    found = pair.found
    return {
        "nodes": found.nodes,
        "world_size": found.world_size,
        "layout": found.layout,
        "memory": found.memory,
        "seconds": {**vars(found.time), "total": found.time.total},
        "seconds_with_the_hosts_router": {**vars(pair.plain), "total": pair.plain.total},
        "overhead": pair.overhead,
    }


def _utilisation(found: Found, machine: Hardware) -> float:
    """Model FLOPs, without what is computed again, over the peak."""
    from rmoe_megablocks.planning.counts.flops import flops

    s = found.settings
    step = s.global_batch_size * s.seq_length * flops(s).training
    return step / (found.world_size * machine.flops * found.time.total)


def draw(name: str, pairs: Sequence[Pair], file: Path) -> None:
    """Writes the figure. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--figure needs matplotlib: pip install 'rmoe-megablocks[compare]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, (times, shares) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    gpus = [pair.found.world_size for pair in pairs]
    times.loglog(gpus, [pair.found.time.total for pair in pairs], "o-", label="with this router")
    times.loglog(gpus, [pair.plain.total for pair in pairs], "x--", label="the host's router, same layout")
    first = pairs[0].found
    ideal = [first.time.total * first.world_size / n for n in gpus]
    times.loglog(gpus, ideal, ":", color="grey", label="as fast a GPU as at the start")
    times.set(xlabel="GPUs", ylabel="seconds a step", title="step time (estimate)")
    times.legend()
    labels = {"routing": "router's passes", "state": "state in pipeline messages", "shared": "shared gradients, stages"}
    bottom = [0.0] * len(pairs)
    places = range(len(pairs))
    for part, label in labels.items():
        heights = [100 * getattr(pair.found.time, part) / pair.found.time.total for pair in pairs]
        shares.bar(places, heights, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    overheads = [100 * pair.overhead for pair in pairs]
    shares.plot(places, overheads, "kx", label="over the host's router")
    shares.set_xticks(places, [f"{n:,}" for n in gpus], rotation=45)
    shares.set(xlabel="GPUs", ylabel="per cent of the step", title="what the routing takes (estimate)")
    shares.set_ylim(0, 1.4 * max(*bottom, *overheads))
    shares.legend()
    chart.suptitle(name)
    chart.savefig(file, dpi=150)
    pyplot.close(chart)
