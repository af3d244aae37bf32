"""What ``rmoe analyze`` takes for its report."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from rmoe_megablocks.errors import UsageError

#: tokens of the text that a model's panel of the token view shows
TOKENS = 2000
#: models side by side on a page
MODELS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group ``report``."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--report", type=Path, metavar="DIR", help="DIR/index.html: figures and a view of the tokens, for 1-4 models"
    )
    group.add_argument(
        "--report-tokens", type=int, default=TOKENS, metavar="N", help=f"in the view of the tokens (default: {TOKENS})"
    )


def check(args: argparse.Namespace, models: int) -> None:
    """Before a long recording. Raises UsageError: too many models, a folder that is a file, a missing extra,
    --no-measures."""
    if args.report is None:
        return
    if args.no_measures:
        raise UsageError("--report shows measures: leave --no-measures out")
    check_models(models)
    if args.report_tokens < 1:
        raise UsageError(f"--report-tokens {args.report_tokens}: expected 1 or more")
    if args.report.exists() and not args.report.is_dir():
        raise UsageError(f"--report {args.report}: there is a file of that name")
    check_extra()


def check_models(models: int) -> None:
    """Raises UsageError."""
    if not 1 <= models <= MODELS:
        raise UsageError(f"--report shows 1 to {MODELS} models side by side, not {models}")


def check_extra() -> None:
    """Raises UsageError."""
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install 'rmoe-megablocks[analyze]'")
