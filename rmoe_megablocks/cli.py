"""The ``rmoe`` command: each subcommand calls one function of a room of the package."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from rmoe_megablocks import __version__, doctor
from rmoe_megablocks.analysis import cli as analysis_cli
from rmoe_megablocks.comparison import cli as compare_cli
from rmoe_megablocks.compat.megablocks import cli as install_cli
from rmoe_megablocks.conversion import cli as conversion_cli
from rmoe_megablocks.data import cli as data_cli
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import cli as evaluation_cli
from rmoe_megablocks.finetuning import cli as finetuning_cli
from rmoe_megablocks.generation import cli as generation_cli
from rmoe_megablocks.planning import cli as plan_cli
from rmoe_megablocks.sweep import cli as sweep_cli


class _Parser(argparse.ArgumentParser):
    """Its subparsers, which argparse makes of the same class, too: one line in the place of a usage text and one."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``rmoe ARGV``; the exit code, 2 for bad input, which is told in one line."""
    parser = _Parser(prog="rmoe", description="Tools around recurrent-router MoE training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data_cli.add_arguments(commands)
    plan_cli.add_arguments(commands)
    sweep_cli.add_arguments(commands)
    compare_cli.add_arguments(commands)
    conversion_cli.add_arguments(commands)
    evaluation_cli.add_arguments(commands)
    generation_cli.add_arguments(commands)
    analysis_cli.add_arguments(commands)
    finetuning_cli.add_arguments(commands)
    doctor.add_arguments(commands)
    install_cli.add_arguments(commands)
    try:
        args, args.megatron_arguments = parser.parse_known_args(argv)
        if args.megatron_arguments and args.command not in ("plan", "sweep", "eval", "import", "analyze"):
            parser.error("unrecognized arguments: " + " ".join(args.megatron_arguments))
        run = {
            "data": data_cli.run,
            "plan": plan_cli.run,
            "sweep": sweep_cli.run,
            "compare": compare_cli.run,
            "export": conversion_cli.run,
            "import": conversion_cli.run,
            "eval": evaluation_cli.run,
            "generate": generation_cli.run,
            "analyze": analysis_cli.run,
            "finetune": finetuning_cli.run,
            "doctor": doctor.run,
            "install": install_cli.run,
        }
        return run[args.command](args)
    except UsageError as error:
        print(f"rmoe: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
