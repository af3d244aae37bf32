"""The runner: finds a benchmark by name, prints its table and, with --output, keeps it."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.command_line import Parser, check_file
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report as report_error

#: module of this package, one a benchmark; each has add_arguments(parser) and run(args) -> the table's text
BENCHMARKS = {
    "routing_step": "the routing step of one layer, in every form: time, error, memory, distance to the roofline",
    "router_overhead": "what a training step costs with the gru router over the linear one, with an A/A control",
    "analysis_speed": "how fast the measures of rmoe analyze stream over recorded routing, and their peak memory",
    "moe_layer": "tokens per second of one MoE layer: Megatron's sequential experts, MegaBlocks' grouped ones",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of one benchmark. Raises UsageError, one line, for those that it does not take."""
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, summary in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=summary, description=summary)
        benchmark.add_argument("--output", type=Path, help="also write the table to this file")
        importlib.import_module(f"benchmarks.{name}").add_arguments(benchmark)
    args = parser.parse_args(argv)
    check_file(args.output, "--output")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; its exit code: 2 for bad input, 1 for a result that is wrong or could not be had."""
    from benchmarks.measuring.errors import WrongResult

    try:
        args = parse(argv)
        table = importlib.import_module(f"benchmarks.{args.name}").run(args)
    except UsageError as error:
        report_error(error)
        return 2
    except WrongResult as error:
        report_error(error)
        return 1
    print(table)
    if args.output:
        args.output.write_text(table + "\n")
    return getattr(args, "status", 0)


if __name__ == "__main__":
    sys.exit(main())
