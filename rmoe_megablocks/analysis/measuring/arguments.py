"""What ``rmoe analyze`` takes for measuring and comparing."""

from __future__ import annotations

import argparse

from rmoe_megablocks.analysis.measuring.options import Options

_OPTIONS = {
    "information_tokens": "tokens of the mutual information, drawn evenly; 0: all",
    "baseline_tokens": "tokens of its shuffled baseline, drawn evenly",
    "path_tokens": "tokens of the paths, drawn evenly",
    "batch_tokens": "tokens of a batch, for MaxVio of batches",
    "resamples": "of the bootstrap over windows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups ``measures`` and ``comparison``; :func:`options_of` reads the first."""
    group = parser.add_argument_group("measures")
    for name, what in _OPTIONS.items():
        default = getattr(Options, name)
        group.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    group.add_argument(
        "--measure-seed", type=int, default=Options.seed, metavar="N", help="of what is drawn and shuffled (default: 0)"
    )
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--compare", action="store_true", help="put the models side by side, with intervals over seeds or over windows"
    )
    group.add_argument(
        "--baseline", metavar="GROUP", help="what the others are held against (default: linear, else the first)"
    )


def options_of(args: argparse.Namespace) -> Options:
    """Raises UsageError for a value below its least one."""
    return Options(**{name: getattr(args, name) for name in _OPTIONS}, seed=args.measure_seed)
