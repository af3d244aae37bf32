"""The command ``rmoe plan``: what a configuration takes, before anything is started."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import Config, find_config, load_config, merge, to_argv

if TYPE_CHECKING:
    from rmoe_megablocks.planning import Settings

_EPILOG = """\
Every other argument is Megatron's or the router's and beats the configuration's, as for launch/pretrain_rmoe.sh:

  rmoe plan configs/rmoe_0.9b_8xa100.yaml --micro-batch-size 8 --moe-router-rnn-hidden-size 256

Activations are those of Transformer Engine's attention; --transformer-impl local plans for a machine without it.
The exit code is 1 when the run would not fit, and 2 for what cannot be planned: unknown options, sizes that do not
fit each other.
"""


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``plan`` to the subparsers of ``rmoe``; :func:`run` runs what they parse.

    What it leaves over are Megatron's arguments: ``args.megatron_arguments``.
    """
    parser = subparsers.add_parser(
        "plan",
        help="parameters, FLOPs, memory and traffic of a configuration",
        description="Parameters, FLOPs, memory and traffic of a configuration, without building anything.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="rmoe plan CONFIG [options] [any Megatron argument ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="configuration file, as for launch/pretrain_rmoe.sh --config")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU (default: the configuration's, else 80)")
    add("--world-size", type=int, metavar="N", help="ranks of the whole run (default: the configuration's)")
    add("--nproc-per-node", "--nproc_per_node", type=int, metavar="N", help="ranks on one machine, with --nnodes")
    add("--nnodes", type=int, metavar="N", help="machines (default 1)")
    add(
        "--nodes", metavar="N", help="estimate the step time on N nodes, N,M,... or FIRST:LAST, each in its best layout"
    )
    add("--hardware", metavar="NAME", default="a100-80g", help="of --nodes: a100-80g or h100-80g, with figures of "
        "one's own as h100-80g,network=25e9,compute=0.4 (default a100-80g)")  # fmt: skip
    add("--figure", type=Path, metavar="FILE", help="of --nodes: also draw it, .png or .svg")
    add("--json", action="store_true", help="print everything as JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if the run fits, 1 if not. Raises UsageError with one line for what cannot be planned."""
    from rmoe_megablocks.planning import report  # late: they import torch, which the other commands do without
    from rmoe_megablocks.planning.plan import make_plan
    from rmoe_megablocks.planning.settings import is_argument, read_settings

    path = find_config(args.config)
    config = load_config(path)
    if args.megatron_arguments and not args.megatron_arguments[0].startswith("--"):
        raise UsageError(f"{args.megatron_arguments[0]!r} is not an argument (expected --name value)")
    settings = read_settings(merge(to_argv(config.arguments), args.megatron_arguments, is_argument))
    if args.nodes is not None:
        from rmoe_megablocks.planning.scale import command

        return command.run(args, path.stem, settings)
    plan = make_plan(settings, _world_size(args, config, settings), _gpu_memory(args, config))
    if args.json:
        json.dump({"config": str(path), **plan.as_dict()}, sys.stdout, indent=2)
        print()
    else:
        print(report.text(plan, path.stem))
    return 0 if plan.fits else 1


def _world_size(args: argparse.Namespace, config: Config, settings: Settings) -> int:
    if args.world_size is not None and (args.nproc_per_node is not None or args.nnodes is not None):
        raise UsageError("--world-size is --nproc-per-node times --nnodes: give one or the other")
    for name in ("world_size", "nproc_per_node", "nnodes"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} {number}: expected at least 1")
    if args.nproc_per_node is not None or args.nnodes is not None:
        size = (args.nproc_per_node or 8) * (args.nnodes or 1)
    else:
        size = args.world_size
    if size is None:
        size = _positive("RMOE_WORLD_SIZE", config, int) or settings.replica
    if size < settings.replica:
        raise UsageError(f"{size} ranks for a layout of {settings.replica}: give --world-size a multiple of it")
    return size


def _gpu_memory(args: argparse.Namespace, config: Config) -> float:
    size = args.gpu_memory if args.gpu_memory is not None else _positive("RMOE_GPU_MEMORY", config) or 80.0
    if not 0 < size < math.inf:  # nor nan
        raise UsageError(f"--gpu-memory {size:g}: expected GiB above 0")
    return size


def _positive(name: str, config: Config, kind: type = float) -> float | None:
    """A variable of the user's environment, else of the configuration's ENV_VARS."""
    text = os.environ.get(name) or config.env.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise UsageError(f"{name}={text}: expected a {'whole ' * (kind is int)}number above 0")
    return value
