"""The runs of a folder as a table: figures by arm over seeds, and differences to the baseline, paired by seed.

Pairs share the seed, so that they have the same data in the same order; of an arm without a partner the difference is
left out. The interval is the percentile bootstrap's of the mean difference, 95 %, over seeds: with five of them it is
narrower than it ought to be (it cannot leave the range of what was seen), so the table says how many there are.
"""

import argparse
import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmoe_megablocks.errors import UsageError
from studies.router_init import arms, runs

SPLITS = ("test", "valid")
MOMENTS = {"entropy_quarter": 0.25, "entropy_half": 0.5, "entropy_end": 1.0}
_RESAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--earlier", type=Path, metavar="CSV", help="a runs.csv whose other runs belong to it too")
    parser.add_argument("--output", type=Path, help="folder for report.md and runs.csv (default: that of the runs)")
    parser.add_argument("--figure", action="store_true", help="curves.png beside them; needs the extra 'studies'")


def run(args: argparse.Namespace) -> int:
    """Prints the table and leaves it, with the figures of every run, in two files."""
    here = collect(args.runs_dir)
    found = _ordered(here | {name: row for name, row in _earlier(args.earlier).items() if name not in here})
    if not found:
        raise UsageError(f"--runs-dir {args.runs_dir}: no finished run of this study, as {arms.BASELINE}-seed1")
    output = args.output or args.runs_dir
    output.mkdir(parents=True, exist_ok=True)
    table = markdown(found)
    (output / "report.md").write_text(table)
    (output / "runs.csv").write_text(as_csv(found))
    print(table, end="")
    if args.figure:
        from studies.router_init import figure

        figure.draw(args.runs_dir, here, output / "curves.png")
    return 0


def collect(folder: Path) -> dict[arms.Name, dict[str, float | None]]:
    """Figures of each finished run, those that it does not have None; ordered by condition, arm and seed."""
    names = (arms.name_of(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    known = [name for name in names if name is not None and runs.is_complete(folder / str(name))]
    return _ordered({name: figures(folder / str(name)) for name in known})


def _ordered(found: dict[arms.Name, dict]) -> dict[arms.Name, dict]:
    names = sorted(found, key=lambda name: (name.condition, arms.rank(name.arm), name.arm, name.seed))
    return {name: found[name] for name in names}


def _earlier(file: Path | None) -> dict[arms.Name, dict[str, float | None]]:
    """The rows of a runs.csv by their run's name."""
    if file is None:
        return {}
    try:
        with file.open(newline="") as text:
            rows = list(csv.DictReader(text))
        names = [arms.Name(row.pop("arm"), row.pop("condition"), int(row.pop("seed"))) for row in rows]
        figures_of = [{column: float(cell) if cell else None for column, cell in row.items()} for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--earlier {file}: is no runs.csv of this study ({error})") from None
    return dict(zip(names, figures_of, strict=True))


def figures(folder: Path) -> dict[str, float | None]:
    """Of one run: bits per character, entropy on the way, standard deviation of the logits; means over the layers."""
    summary = json.loads((folder / "summary.json").read_text())
    result: dict[str, float | None] = {"iterations": summary["iterations"]}
    for split in SPLITS:
        result[split] = summary.get(f"{split}_bpc", summary.get(f"{split}_bpc_partial"))
    told = routing(folder)
    for name, moment in MOMENTS.items():
        result[name] = _at(told, "router_entropy", moment * summary["iterations"])
    first = told.get(1, {}).get("logits_std")
    result["logits_std_start"] = first and statistics.fmean(first)
    result["logits_std_end"] = _at(told, "logits_std", summary["iterations"])
    return result


def routing(folder: Path) -> dict[int, dict[str, list[float]]]:
    """What metrics.jsonl says of the routing, by iteration."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["iteration"]: record["routing"] for record in records if "routing" in record}


def _at(told: dict[int, dict[str, list[float]]], figure: str, moment: float) -> float | None:
    """Mean over the layers at the last iteration told up to ``moment``; None where nothing was."""
    before = [iteration for iteration, values in told.items() if iteration <= moment and values.get(figure)]
    return statistics.fmean(told[max(before)][figure]) if before else None


def interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None of fewer than two values."""
    if len(differences) < 2:
        return None
    generator = np.random.default_rng(seed)
    means = generator.choice(np.asarray(differences), (_RESAMPLES, len(differences))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def differences(found: dict, arm: str, condition: str, figure: str, partner: str = "baseline") -> list[float]:
    """Of an arm's runs to their partners, the ``baseline`` or ``plain`` ones of the same seed and condition."""
    of_arm = (name for name in found if (name.arm, name.condition) == (arm, condition))
    pairs = ((found[name], found.get(getattr(name, partner))) for name in of_arm)
    return [ours[figure] - theirs[figure] for ours, theirs in pairs if theirs is not None]


_HEAD = (
    "arm", "seeds", "test bpc", "valid bpc", "test - baseline", "valid - baseline", "test - without the variant",
    "entropy at 1/4", "1/2", "end", "logits' std at start", "end",
)  # fmt: skip


def markdown(found: dict[arms.Name, dict[str, float | None]]) -> str:
    """The table, a row an arm."""
    lines = [
        f"Bits per character: mean ± standard deviation over seeds. Baseline: {arms.BASELINE}; differences to it are",
        "means over pairs of one seed, with the 95 % percentile bootstrap interval (too narrow with few seeds) and the",
        "number of pairs. Entropy (nats) and logits' standard deviation are means over layers and seeds.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    for arm, condition in dict.fromkeys((name.arm, name.condition) for name in found):
        rows = {name: values for name, values in found.items() if (name.arm, name.condition) == (arm, condition)}
        lines.append("| " + " | ".join(_cells(found, rows, arm, condition)) + " |")
    return "\n".join(lines) + "\n"


def _cells(found: dict, rows: dict, arm: str, condition: str) -> list[str]:
    cells = [next(iter(rows)).labelled, ", ".join(str(name.seed) for name in rows)]
    for split in SPLITS:
        values = [row[split] for row in rows.values()]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.4f}{spread}")
    cells += [_difference(differences(found, arm, condition, split), arm) for split in SPLITS]
    is_variant = arm not in arms.DEFAULT
    cells.append(_difference(differences(found, arm, condition, "test", "plain"), arm) if is_variant else "")
    forms = dict.fromkeys(MOMENTS, ".3f") | dict.fromkeys(("logits_std_start", "logits_std_end"), ".2g")
    for name, form in forms.items():
        values = [row[name] for row in rows.values() if row[name] is not None]
        missing = f" ({len(values)} runs)" if 0 < len(values) < len(rows) else ""
        cells.append(f"{statistics.fmean(values):{form}}{missing}" if values else "-")
    return cells


def _difference(values: list[float], arm: str) -> str:
    if arm == arms.BASELINE:
        return "0"
    if not values:
        return "- (no pair)"
    between = interval(values)
    told = f" [{between[0]:+.4f}, {between[1]:+.4f}]" if between else ""
    return f"{statistics.fmean(values):+.4f}{told} ({len(values)})"


def as_csv(found: dict[arms.Name, dict[str, float | None]]) -> str:
    """A row a run; what a run does not have is empty."""
    text = io.StringIO()
    columns = list(next(iter(found.values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "condition", "seed", *columns])
    for name, values in found.items():
        writer.writerow([name.arm, name.condition, name.seed, *(values[column] for column in columns)])
    return text.getvalue()
