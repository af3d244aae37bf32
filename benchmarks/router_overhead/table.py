"""What was measured of whole steps, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measuring import quantiles
from benchmarks.measuring.quantiles import Estimate

GRU, LINEAR, CONTROL = "gru", "linear", "control"
CLOCKS = {"wall": "wall", "processor": "processor (all threads)"}
#: how far from 1 the control's median may be, however wide its interval
TOLERANCE = 0.005


@dataclass
class Depth:
    """Models of one number of layers: ``seconds`` of every step (with attributes wall, processor) by model, bytes
    ``saved`` for the backward pass of a step, ``peak`` bytes on a GPU.
    """

    layers: int
    tokens: int
    seconds: dict[str, list]
    saved: dict[str, int]
    peak: dict[str, int | None]

    def times(self, model: str, clock: str) -> list[float]:
        """Seconds of each step of a model."""
        return [getattr(seconds, clock) for seconds in self.seconds[model]]

    def ratio(self, model: str, clock: str) -> Estimate:
        """Of ``model`` to linear."""
        return quantiles.estimate(quantiles.ratios(self.times(model, clock), self.times(LINEAR, clock)))

    def extra(self, clock: str) -> list[float]:
        """Nanoseconds a token that gru takes longer than linear, pair by pair."""
        pairs = quantiles.differences(self.times(GRU, clock), self.times(LINEAR, clock))
        return [1e9 * seconds / self.tokens for seconds in pairs]


def verdict(depth: Depth, clock: str) -> str:
    """What the ratio says, if the control lets it say anything."""
    why_not = quantiles.why_no_verdict(depth.ratio(CONTROL, clock), TOLERANCE)
    if why_not is not None:
        return f"no verdict: {why_not}"
    ratio = depth.ratio(GRU, clock)
    percent = [f"{100 * (value - 1):+.2f}" for value in (ratio.median, ratio.low, ratio.high)]
    return f"gru takes {percent[0]} % ({percent[1]} to {percent[2]})"


def markdown(depths: Sequence[Depth], where: str, what: str, device: str) -> str:
    """The table: of the first depth times, ratios and memory, of both the slope."""
    deep = depths[0]
    pairs = len(deep.seconds[GRU])
    lines = [
        where,
        f"{deep.layers} layers of the 0.91B model: {what}",
        f"{pairs} pairs of steps in turn; ratios and differences of neighbours: median (95 % bootstrap interval); no "
        f"verdict where the control's interval leaves out 1 or its median is off by more than {TOLERANCE:.1%}",
        "a step: Megatron's train_step, loss and norm read, router figures every tenth; experts chosen at random",
        "",
        "| clock | gru ms: p20, p50, p80 | linear | gru / linear | control / linear | extra ns a token and layer |"
        " verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for clock, name in CLOCKS.items():
        cells = [name, *(_milliseconds(deep.times(model, clock)) for model in (GRU, LINEAR))]
        cells += [deep.ratio(model, clock).text(".4f") for model in (GRU, CONTROL)]
        each = quantiles.estimate([extra / deep.layers for extra in deep.extra(clock)])
        lines.append("| " + " | ".join([*cells, each.text(".1f"), verdict(deep, clock)]) + " |")
    if len(depths) > 1:
        lines += ["", *_slope(*depths)]
    return "\n".join([*lines, "", *_memory(deep, device)])


def _slope(deep: Depth, shallow: Depth) -> list[str]:
    """What a layer more adds to what gru takes longer: the first layer has no state to continue, the others have."""
    steps = deep.layers - shallow.layers
    texts = []
    for clock, name in CLOCKS.items():
        if quantiles.why_no_verdict(deep.ratio(CONTROL, clock), TOLERANCE) is not None:
            texts.append(f"{name}: no verdict, see the control")
            continue
        slope = quantiles.slope(deep.extra(clock), shallow.extra(clock), steps)
        texts.append(f"{name} {slope.text('.1f')} ns a token")
    return [f"each layer more, {deep.layers} against {shallow.layers}, adds to the difference: {'; '.join(texts)}"]


def _memory(depth: Depth, device: str) -> list[str]:
    saved = {model: depth.saved[model] / depth.tokens for model in (GRU, LINEAR)}
    each = (saved[GRU] - saved[LINEAR]) / depth.layers
    lines = [
        f"saved for the backward pass, bytes a token: gru {saved[GRU]:,.0f}, linear {saved[LINEAR]:,.0f}, "
        f"{saved[GRU] / saved[LINEAR] - 1:+.2%}, {each:+,.0f} a layer"
    ]
    if device == "cuda":
        gru, linear = depth.peak[GRU], depth.peak[LINEAR]
        lines.append(
            f"most memory of model, optimizer and step: gru {gru / 2**20:,.0f} MiB, linear {linear / 2**20:,.0f} MiB, "
            f"{gru / linear - 1:+.2%}"
        )
    return lines


def _milliseconds(seconds: Sequence[float]) -> str:
    return ", ".join(f"{1e3 * value:.1f}" for value in quantiles.quantiles(seconds))
