"""The commands of the study."""

import argparse
import sys
from collections.abc import Sequence

import rmoe_megablocks.megatron  # noqa: F401  CPU mode, before anything imports Megatron
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report as report_error
from studies.router_init import chain, gradients, initial, report, runs

COMMANDS = {"run": runs, "report": report, "initial": initial, "chain": chain, "gradients": gradients}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.router_init", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.strip().splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except UsageError as error:
        report_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
