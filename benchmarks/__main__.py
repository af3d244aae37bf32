"""The runner: finds a benchmark by name, prints its table and, with --output, keeps it."""

import argparse
import importlib
import sys
from pathlib import Path

#: module of this package, one a benchmark; each has add_arguments(parser) and run(args) -> the table's text
BENCHMARKS = {
    "router_overhead": "step time and peak memory of the gru router over the linear one, whole training runs",
    "moe_layer": "tokens per second of one MoE layer: Megatron's sequential experts, MegaBlocks' grouped ones",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, summary in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=summary, description=summary)
        benchmark.add_argument("--output", type=Path, help="also write the table to this file")
        importlib.import_module(f"benchmarks.{name}").add_arguments(benchmark)
    args = parser.parse_args()
    table = importlib.import_module(f"benchmarks.{args.name}").run(args)
    print(table)
    if args.output:
        args.output.write_text(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
