"""The command ``rmoe compare``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rmoe_megablocks.errors import UsageError

_NEEDED = ("pandas", "scipy", "seaborn", "tabulate")
_EPILOG = """\
RUN is a run's folder, a folder of runs, or a quoted pattern of either:

  rmoe compare runs/linear-seed* runs/gru-seed* --by router --out comparison
  rmoe compare 'runs/lr-*' --by router,lr

A pair is two runs with the same --seed: they had the same batches in the same order.
"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``compare`` to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    parser = subparsers.add_parser(
        "compare",
        help="runs side by side: means over seeds, paired differences with intervals, curves, cost",
        description="Runs side by side: means over seeds, paired differences with intervals, curves, cost.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run, folder of runs, or pattern")
    add("--by", metavar="NAMES", help="what is compared: router, or Megatron's names, with commas (default: all that "
        "differs)")  # fmt: skip
    add("--baseline", metavar="GROUP", help="what the others are held against (default: linear, else the first)")
    add("--x", choices=("iteration", "tokens", "hours"), default="iteration", help="the curves' axis")
    add("--out", type=Path, metavar="DIR", help="folder for comparison.md, .csv, runs.csv, curves.png and .svg")


def missing_libraries() -> list[str]:
    """What a comparison needs and is not installed."""
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]


def run(args: argparse.Namespace) -> int:
    """Prints the tables and warnings, and leaves files in --out. Raises UsageError with one line for bad input."""
    if missing := missing_libraries():
        raise UsageError(f"compare needs {', '.join(missing)}: pip install 'rmoe-megablocks[compare]'")
    from rmoe_megablocks.comparison import groups, runs

    found = runs.find_runs(args.runs)
    dests = groups.dests_of(args.by, found) if args.by else groups.differing(found)
    of_label = groups.grouped(found, dests)
    return _show(of_label, dests, _baseline(args.baseline, list(of_label)), args.x, args.out)


def show(folders: Mapping[str, Sequence[Path]], options: Iterable[str], baseline: str, out: Path) -> int:
    """The same for runs whose labels are known and that ought to differ in ``options`` alone: a study's."""
    from rmoe_megablocks.comparison import groups, runs

    of_label = {label: [runs.read_run(folder) for folder in places] for label, places in folders.items()}
    found = [run for group in of_label.values() for run in group]
    return _show(of_label, groups.dests_of_options(options, found), baseline, "iteration", out)


def _show(of_label: dict, dests: Sequence[str], baseline: str, axis: str, out: Path | None) -> int:
    from rmoe_megablocks.comparison import figures, groups, report

    of_label = {baseline: of_label.pop(baseline), **of_label}
    metrics = report.metrics_of([run for group in of_label.values() for run in group])
    if out:
        _make(out)
    results = report.results(of_label, baseline, metrics)
    costs, unplanned = report.costs(of_label, baseline)
    text = report.markdown(results, costs, baseline, metrics, [*groups.warnings(of_label, dests), *unplanned])
    print(text, end="")
    if out:
        (out / "comparison.md").write_text(text)
        results.merge(costs, on="group").to_csv(out / "comparison.csv", index=False)
        report.of_runs(of_label, metrics).to_csv(out / "runs.csv", index=False)
        figures.draw(figures.curves(of_label, axis), axis, out / "curves")
        print(f"{out}: comparison.md, comparison.csv, runs.csv, curves.png, curves.svg", file=sys.stderr)
    return 0


def _baseline(asked: str | None, labels: list[str]) -> str:
    from rmoe_megablocks.routing import LINEAR  # late: it brings torch

    if asked is None:
        return next((label for label in labels if label.split(",")[0] == LINEAR), labels[0])
    if asked not in labels:
        raise UsageError(f"--baseline {asked}: the groups are {'; '.join(labels)}")
    return asked


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror or error}") from None
