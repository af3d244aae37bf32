"""What was measured, as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import machine
from benchmarks.measuring.quantiles import estimate, quantiles, ratios
from benchmarks.routing_step.inputs import recurrence
from benchmarks.routing_step.providers import PROVIDERS
from benchmarks.routing_step.roofline import Rates, forward_bytes, forward_flop
from benchmarks.routing_step.sizes import SIZES

FORWARD, BOTH = PASSES = ("forward", "forward+backward")


@dataclass
class Result:
    """All of one size and number of tokens.

    Attributes:
        seconds: by provider and pass, one value a round.
        saved: bytes a provider keeps for its backward pass.
        errors: of a provider's outputs and gradients.
    """

    size: str
    tokens: int
    rates: Rates
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def roofline(self) -> float:
        """Seconds of a forward pass at the machine's rates."""
        return self.rates.forward_seconds(SIZES[self.size], self.tokens)


def rows(result: Result, baselines: Sequence[str]) -> list[dict[str, object]]:
    """One a provider and pass; what was not measured is None."""
    size, found = SIZES[result.size], []
    for name, times in result.seconds.items():
        for which in PASSES:
            p20, p50, p80 = (1e3 * value for value in quantiles(times[which]))
            row: dict[str, object] = {
                "provider": name,
                "size": result.size,
                "tokens": result.tokens,
                "hidden_size": size.hidden_size,
                "state_size": size.state_size,
                "experts": size.experts,
                "dtype": size.dtypes,
                "pass": which,
                "rounds": len(times[which]),
                "p20_ms": p20,
                "p50_ms": p50,
                "p80_ms": p80,
            }
            for baseline in baselines:
                other = result.seconds.get(baseline)
                ratio = None if other is None else estimate(ratios(times[which], other[which]))
                row[f"ratio_to_{baseline}"] = None if ratio is None else ratio.median
                row[f"ratio_to_{baseline}_low"] = None if ratio is None else ratio.low
                row[f"ratio_to_{baseline}_high"] = None if ratio is None else ratio.high
            row["saved_bytes_a_token"] = result.saved[name] / result.tokens
            row["error_outputs"], row["error_gradients"] = result.errors[name]
            is_whole = PROVIDERS[name].equations is recurrence  # the others compute less
            row["roofline_ms"] = 1e3 * result.roofline if which == FORWARD and is_whole else None
            row["copy_gb_s"], row["matmul_tflop_s"] = result.rates.copy / 1e9, result.rates.matmul / 1e12
            found.append(row)
    return found


def as_csv(results: Sequence[Result], baselines: Sequence[str], clock: str) -> str:
    """A row for every provider, size and pass, with the machine it was measured on."""
    text = io.StringIO()
    everywhere = {"device": machine.name(), "machine": machine.describe(), "clock": clock}
    writer = None
    for row in (row for result in results for row in rows(result, baselines)):
        row |= everywhere
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue()


def markdown(results: Sequence[Result], baselines: Sequence[str], clock: str, load: str) -> str:
    """A table for each size, under what holds for all of them."""
    lines = [
        f"{machine.describe()}; {load}",
        f"the routing step of one layer that has a previous state; {clock}",
        "providers in turn, in an order that is turned round every other round",
        "ratios: median over rounds of the ratio of one round, with its 95 % bootstrap interval; below 1 is faster",
        "saved: kept for the backward pass, each storage once, without parameters, hidden states and previous state",
        "errors: largest relative error (Frobenius) of outputs and of gradients against float64 on the same values",
    ]
    for result in results:
        lines += ["", *_table(result, baselines)]
    return "\n".join(lines)


def _table(result: Result, baselines: Sequence[str]) -> list[str]:
    size, rates = SIZES[result.size], result.rates
    measured = [name for name in baselines if name in result.seconds]
    bytes_, flop = forward_bytes(size), forward_flop(size)
    bound = "memory" if bytes_ / rates.copy > flop / rates.matmul else "arithmetic"
    head = ["provider", "pass", "ms: p20", "p50", "p80", *(f"/ {name}" for name in measured)]
    head += ["/ roofline", "saved bytes a token", "errors"]
    rounds = len(next(iter(result.seconds.values()))[FORWARD])
    lines = [
        f"{result.size}, {size.summary}: T {result.tokens}, H {size.hidden_size}, P {size.state_size}, "
        f"E {size.experts}, {size.dtypes}; {rounds} rounds",
        f"roofline of the forward pass {1e3 * result.roofline:.3f} ms, by {bound}: {bytes_} bytes and {flop / 1e6:.2f} "
        f"MFLOP a token at {rates.copy / 1e9:,.1f} GB/s (copy) and {rates.matmul / 1e12:,.3f} TFLOP/s (product), "
        "both measured here",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows(result, measured):
        forward = row["pass"] == FORWARD
        cells = [f"{row['provider']}: {PROVIDERS[row['provider']].summary}" if forward else "", row["pass"]]
        cells += [f"{row[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
        for name in measured:
            middle, low, high = (row[f"ratio_to_{name}{end}"] for end in ("", "_low", "_high"))
            cells.append("1" if name == row["provider"] else f"{middle:.3f} ({low:.3f} to {high:.3f})")
        cells.append(f"{row['p50_ms'] / row['roofline_ms']:.2f}" if row["roofline_ms"] else "")
        cells.append(f"{row['saved_bytes_a_token']:,.0f}" if forward else "")
        cells.append(f"{row['error_outputs']:.0e}, {row['error_gradients']:.0e}" if forward else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines
