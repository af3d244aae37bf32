"""What ``rmoe import --split-ffn`` was asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rmoe_megablocks.conversion.dense import splitting
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.command_line import router_arguments
from rmoe_megablocks.routing import Argument, get_router_type

_OPTIONS = ("topk", "scale", "method", "seed")


@dataclass(frozen=True)
class Options:
    """Attributes:
    experts, topk: E, K.
    method: of :func:`.splitting.split`.
    scale: what the experts' outputs are multiplied by, in their matrices.
    seed: of the split and of the router's weights.
    router_type, router_options: of the router, values by argument.
    """

    experts: int
    topk: int
    method: str
    scale: float
    seed: int
    router_type: str
    router_options: dict[Argument, Any]


def read(args: argparse.Namespace) -> Options | None:
    """The options; None without --split-ffn.

    Raises:
        UsageError: one line for a wrong value, and for what means nothing without --split-ffn.
    """
    typed: Sequence[str] = args.megatron_arguments
    if args.split_ffn is None:
        given = [f"--split-{name}" if name != "seed" else "--seed" for name in _OPTIONS if _given(args, name)]
        if given or typed:
            raise UsageError(f"{(given or typed)[0]} means nothing without --split-ffn, which makes a router")
        return None
    experts, topk = args.split_ffn, args.split_topk if args.split_topk is not None else 2
    if experts < 2:
        raise UsageError(f"--split-ffn {experts}: expected at least 2 experts")
    if not 1 <= topk <= experts:
        raise UsageError(f"--split-topk {topk}: expected 1 to {experts}, the number of experts")
    scale = experts / topk if args.split_scale is None else args.split_scale
    if not 0 < scale < float("inf"):
        raise UsageError(f"--split-scale {args.split_scale:g}: expected a number above 0")
    seed = args.seed or 0
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")
    method = args.split_method or splitting.RANDOM
    splitting.check_available(method)
    router = _router(typed)
    kind = get_router_type(router.moe_router_type)
    options = {argument: getattr(router, argument.dest) for argument in kind.arguments}
    return Options(experts, topk, method, scale, seed, kind.name, options)


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name if name == "seed" else f"split_{name}") is not None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message} (see rmoe import --help)")


def _router(typed: Sequence[str]) -> argparse.Namespace:
    """The router's arguments, Megatron's spelling: --moe-router-type and those of the type that it names."""
    router_arguments.load_named_type(typed)
    parser = _Parser(prog="rmoe import", add_help=False, allow_abbrev=False)
    router_arguments.add_arguments(parser)
    found = parser.parse_args(typed)
    kind = get_router_type(found.moe_router_type)
    spelled = {word.partition("=")[0] for word in typed}
    for argument in router_arguments.named(spelled):
        if argument not in kind.arguments:
            raise UsageError(f"{argument.option} is no argument of --moe-router-type {kind.name}: leave it out")
    return found


def check_divides(options: Options, width: int, folder: Path) -> None:
    """Raises UsageError where the feed-forward layers cannot be cut into experts of one size."""
    if width % options.experts:
        raise UsageError(
            f"--split-ffn {options.experts}: the feed-forward layers of {folder} have {width} neurons, which that "
            "does not divide"
        )
