"""The command ``rmoe install``: packages that plain pip cannot put beside Megatron-Core."""

from __future__ import annotations

import argparse
import sys

from rmoe_megablocks.compat.megablocks.install import VERSIONS, install


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``install`` to the subparsers of ``rmoe``; :func:`run` runs what it parses."""
    text = "install MegaBlocks beside torch and Megatron-Core, compiling nothing"
    parser = subparsers.add_parser("install", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("target", choices=("megablocks",), help="what to install")
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter of another environment (default: this one)",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``rmoe install`` for parsed arguments; the exit code. Raises UsageError when it fails."""
    install(args.python)
    print(f"{' and '.join(f'{name} {version}' for name, version in VERSIONS.items())}: installed")
    return 0
