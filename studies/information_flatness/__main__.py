"""The RMoE paper's mutual information of two layers, of Gaussian logits that are independent, half copied or copied.

The logits' standard deviation says how flat the gates are. Prints the table of docs/analysis.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmoe_megablocks.analysis.measures import gates, information
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report as report_error

SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
_COLUMNS = {
    "deviation": "deviation of logits",
    "inside_balance": "inside balance",
    "independent": "independent",
    "shuffled": "shuffled",
    "above": "above chance",
    "half": "half copied",
    "copied": "copied",
}


def curve(scales: Sequence[float], tokens: int, experts: int, seed: int = 0) -> list[dict[str, float]]:
    """A row a standard deviation of the logits: median inside balance, and mutual information, nats, of independent
    layers (``independent``), the same with tokens ``shuffled``, what is left ``above`` that, of a layer that copies the
    other for ``half`` of the tokens, and of a ``copied`` one, which is the entropy of its bins."""
    rows = []
    for scale in scales:
        generator = np.random.default_rng(seed)
        logits_TLE = scale * generator.standard_normal((tokens, 3, experts))
        half = generator.random(tokens) < 0.5
        logits_TLE[half, 2] = logits_TLE[half, 0]
        powers = np.exp(logits_TLE - logits_TLE.max(-1, keepdims=True))
        scores_TLE = powers / powers.sum(-1, keepdims=True)
        found = information.between_layers(scores_TLE)
        by_chance = information.between_shuffled_layers(scores_TLE, seed)[0, 1]
        rows.append(
            {
                "deviation": scale,
                "inside_balance": float(np.median(gates.inside_balance(scores_TLE[:, 0]))),
                "independent": found[0, 1],
                "shuffled": by_chance,
                "above": found[0, 1] - by_chance,
                "half": found[0, 2],
                "copied": found[0, 0],
            }
        )
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "|" + "--:|" * len(_COLUMNS)]
    for row in rows:
        cells = [f"{row['deviation']:g}", f"{row['inside_balance']:.2f}"]
        cells += [f"{row[name] + 0.0:.3f}" for name in ("independent", "shuffled")]
        cells += [f"{row['above']:+.3f}", f"{row['half']:.3f}", f"{row['copied']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, float]], file: Path):
    """Writes ``file`` and returns the figure. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--figure needs matplotlib: pip install 'rmoe-megablocks[studies]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    x = [row["deviation"] for row in rows]
    for name, label, style in (
        ("copied", "copied: the entropy", "C0-"),
        ("half", "copied for half of the tokens", "C1-"),
        ("independent", "independent", "C2-"),
        ("shuffled", "independent, tokens shuffled", "k:"),
        ("above", "independent, above shuffled", "C3--"),
    ):
        axes.plot(x, [row[name] for row in rows], style, label=label)
    axes.set(
        xscale="log",
        xlabel="standard deviation of the logits (flat gates left, sharp ones right)",
        ylabel="mutual information of two layers, nats",
    )
    axes.legend(fontsize="small")
    chart.savefig(file, dpi=150)
    pyplot.close(chart)
    return chart


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, draws with --figure; its exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.information_flatness", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000, help="of each row (default 20000)")
    parser.add_argument("--experts", type=int, default=16, help="of a layer (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the curves, as .png, .svg or .pdf")
    args = parser.parse_args(argv)
    try:
        if args.tokens < 1 or args.experts < 2:
            raise UsageError(f"--tokens {args.tokens} --experts {args.experts}: at least 1 token and 2 experts")
        if args.figure and not args.figure.parent.is_dir():
            raise UsageError(f"--figure {args.figure}: there is no folder {args.figure.parent}")
        rows = curve(SCALES, args.tokens, args.experts, args.seed)
        print(table(rows))
        if args.figure:
            draw(rows, args.figure)
    except UsageError as error:
        report_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
