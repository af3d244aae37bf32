"""The command ``rmoe sweep``."""

from __future__ import annotations

import argparse
import fnmatch
import shlex
import sys
from pathlib import Path

from rmoe_megablocks.errors import UsageError

_EPILOG = """\
Every other argument goes to all runs and beats the study's, as for launch/pretrain_rmoe.sh:

  rmoe sweep studies/enwik8_cpu.yaml --dataset data/enwik8 --jobs 2

As jobs of a cluster, compared by 'rmoe compare runs/STUDY' when they are done:

  rmoe sweep studies/paper_0.9b.yaml --commands |
      while read -r run; do eval sbatch --gpus-per-node=8 launch/slurm/train.sbatch "$run"; done

Runs that are there are left out, an interrupted one goes on; when all are there, they are compared ('rmoe compare').
"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``sweep`` to the subparsers of ``rmoe``; :func:`run` runs what they parse.

    What it leaves over are arguments of the runs: ``args.megatron_arguments``.
    """
    parser = subparsers.add_parser(
        "sweep",
        help="the runs of a study: variants of a configuration with several seeds, and their comparison",
        description="The runs of a study: variants of a configuration with several seeds, and their comparison.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="rmoe sweep STUDY [options] [any Megatron argument ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="the study's file")
    add("--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: runs/STUDY)")
    add("--only", action="append", metavar="PATTERN", help="runs whose name has it, as seed1, or matches it, as gru-*")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (default 1)")
    add("--list", action="store_true", help="say which runs there are and which are done, start nothing")
    add("--commands", action="store_true", help="print each run's arguments, a line a run, start nothing")


def run(args: argparse.Namespace) -> int:
    """Runs what is missing and compares; 1 if a run failed. Raises UsageError with one line for bad input."""
    from rmoe_megablocks.sweep import running, study

    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: must be at least 1")
    if args.megatron_arguments and not args.megatron_arguments[0].startswith("--"):
        raise UsageError(f"{args.megatron_arguments[0]!r} is not an argument (expected --name value)")
    planned = study.read(args.study)
    runs_dir = args.runs_dir or Path("runs") / args.study.stem
    runs = [(one, [*one.words, *args.megatron_arguments]) for one in planned.runs if _chosen(one.name, args.only)]
    if not runs:
        names = ", ".join(one.name for one in planned.runs)
        raise UsageError(f"--only {' '.join(args.only)}: no run of that name ({names})")
    todo = [(one, words) for one, words in runs if not running.is_done(one, runs_dir, words)]
    if args.list:
        for one, _ in runs:
            print(f"{one.name}: {'to do' if one in dict(todo) else 'done'}")
        return 0
    if args.commands:
        for one, words in runs:
            print(shlex.join([*words, "--runs-dir", str(runs_dir), "--run-name", one.name]))
        return 0
    firsts: dict[str, tuple] = {}
    for one, words in todo:
        firsts.setdefault(one.variant, (one, words))
    for one, words in firsts.values():
        print(f"rmoe: checking {one.variant}", file=sys.stderr, flush=True)
        running.check(one, words, runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        failed = running.run_all(todo, runs_dir, args.jobs, len(runs) - len(todo))
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"rmoe: failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        return 1
    return _compare(runs_dir, [one for one, _ in runs], planned)


def _chosen(name: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, p) or p in name.split("-") for p in patterns)


def _compare(runs_dir: Path, runs: list, planned) -> int:
    from rmoe_megablocks.comparison import cli as compare

    if missing := compare.missing_libraries():
        print(f"rmoe: done; a comparison needs {', '.join(missing)}: pip install 'rmoe-megablocks[compare]'")
        return 0
    labels: dict[str, list[Path]] = {}
    for one in runs:
        labels.setdefault(one.variant, []).append(runs_dir / one.name)
    return compare.show(labels, planned.varied, next(iter(labels)), runs_dir / "comparison")
