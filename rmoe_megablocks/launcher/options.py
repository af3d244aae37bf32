"""The few options that are the launcher's own; every other argument is Megatron's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from rmoe_megablocks.errors import UsageError

_EPILOG = """\
Every other argument is Megatron-Core's (--num-layers, --train-iters, ...) and
beats the configuration file's:

  --name value     replaces what the file says
  --name=null      takes back what the file says; --flag=false or --no-flag does
                   it for a flag, --flag=true or --flag sets it
  --help-megatron  lists all of them with their defaults; --help-megatron WORD
                   those that have to do with WORD, as lr, checkpoint or moe

Environment variables that are set beat the file's ENV_VARS. Relative paths,
also those in a file, are relative to the working directory.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run; a second one ends
it at once. Under torchrun, which starts the processes itself, the same file
takes the same arguments:

  torchrun --nproc-per-node 2 launch/pretrain_rmoe.sh --config configs/tiny.yaml
"""
#: the router's and the run's own arguments, see rmoe_megablocks/megatron/command_line/help_text.py
_OWN_ARGUMENTS = Path(__file__).parent / "arguments_help.txt"
_WIDTH = 79
_LAYOUT = ("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # one line, as for every other error, instead of argparse's usage text; without the alternative spellings
        raise UsageError(re.sub(r"^argument (--[\w-]+)\S*: ", r"\1: ", message))


def parser() -> argparse.ArgumentParser:
    """The parser of the launcher's own options."""
    result = _Parser(
        prog="pretrain_rmoe.sh",
        usage="bash launch/pretrain_rmoe.sh [--config FILE] [any argument ...]",
        description="Pre-train a mixture-of-experts model with a layerwise recurrent router.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=_WIDTH),
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--config", metavar="FILE", help="configuration file; without it: configs/tiny.yaml, a complete small run")
    add("--dry-run", action="store_true", help="check everything, print the command and the arguments, start nothing")
    add("--help-megatron", nargs="?", const="", metavar="WORD", help="list Megatron's arguments, or those about WORD")
    layout = result.add_argument_group("layout (for the launcher; under torchrun its own options say it)")
    add = layout.add_argument
    add(
        "--nproc-per-node",
        type=_positive,
        metavar="N",
        help="processes on this machine; without it: one for each GPU, or what the configuration needs",
    )
    add("--nnodes", type=_positive, default=1, metavar="N", help="machines (default 1)")
    add("--node-rank", type=int, metavar="I", help="number of this machine, from 0")
    add("--master-addr", metavar="HOST", help="address of machine 0; needed with several machines")
    add(
        "--master-port",
        type=_positive,
        metavar="PORT",
        help="port on machine 0 (default: 29500 with several machines, else a free one)",
    )
    return result


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and Megatron's arguments in the order typed."""
    options, rest = parser().parse_known_args([_hyphenated(word) for word in argv])
    _check_layout(options)
    return options, rest


def help_text() -> str:
    """The page of --help: the launcher's options, the router's arguments and the run's, and how to see Megatron's."""
    return f"{parser().format_help()}\n{_OWN_ARGUMENTS.read_text()}\n{_EPILOG}"


def names() -> list[str]:
    """The launcher's own options."""
    return list(parser()._option_string_actions)


def check_under_torchrun(options: argparse.Namespace) -> None:
    """Refuses what the launcher alone can do: torchrun has started the processes already."""
    if options.dry_run:
        raise UsageError("--dry-run is for bash launch/pretrain_rmoe.sh: torchrun has started the processes already")
    defaults = vars(parser().parse_args([]))
    for name in _LAYOUT:
        key = name.removeprefix("--").replace("-", "_")
        if getattr(options, key) != defaults[key]:
            raise UsageError(f"{name} comes before launch/pretrain_rmoe.sh: it is torchrun that starts the processes")


def _hyphenated(word: str) -> str:
    """torchrun also spells its options with underscores."""
    name, equals, value = word.partition("=")
    hyphenated = name.replace("_", "-")
    return hyphenated + equals + value if hyphenated in _LAYOUT else word


def _check_layout(options: argparse.Namespace) -> None:
    if options.master_port is not None and options.master_port > 65535:
        raise UsageError(f"--master-port {options.master_port} is not a port: the highest is 65535")
    if options.nnodes > 1:
        if options.master_addr is None:
            raise UsageError("--nnodes needs --master-addr: the address of machine 0, the same on every machine")
        if options.node_rank is None:
            raise UsageError("--nnodes needs --node-rank: the number of this machine, from 0")
    rank = options.node_rank or 0
    if not 0 <= rank < options.nnodes:
        raise UsageError(f"--node-rank {rank} does not fit --nnodes {options.nnodes}: it counts from 0")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text!r}")
    return value
