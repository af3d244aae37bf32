"""The arguments of all router types in Megatron's parser: declared by the types, see routing/arguments.py."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.routing import (
    RESIDUAL,
    SHARE_HEAD,
    SHARE_PROJECTOR,
    Argument,
    RouterType,
    RoutingConfig,
    all_arguments,
    get_router_type,
    owners,
)
from rmoe_megablocks.routing.registry import LINEAR, router_types

OPTION = "--moe-router-type"


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the choice of a type, and the arguments of all types and of the one that the command line names.

    Raises:
        UsageError: one line, for a named type that cannot be imported or used.
    """
    load_named_type(sys.argv[1:])
    kinds = "; ".join(f"{name}: {get_router_type(name).summary}" for name in _of_this_package())
    group.add_argument(
        OPTION,
        type=_router_type,
        default=LINEAR,
        metavar="TYPE",
        help=f"How router logits come about. {kinds}; or one of yours, module:Class.",
    )
    for argument in all_arguments():
        _add(group, argument)


def _of_this_package() -> list[str]:
    return [name for name in router_types() if ":" not in name and not _is_foreign(name)]


def _is_foreign(name: str) -> bool:
    layer = get_router_type(name).layer if name in router_types() else None
    return layer is not None and not layer.__module__.startswith("rmoe_megablocks.")


def _add(group: argparse._ArgumentGroup, argument: Argument) -> None:
    types = owners(argument)
    all_but_linear = len(types) == len(_of_this_package()) - 1
    aside = "" if LINEAR in types else " Of all types but linear." if all_but_linear else f" Of {', '.join(types)}."
    if isinstance(argument.default, bool):
        group.add_argument(argument.option, action="store_true", help=argument.help + aside)
        return
    group.add_argument(
        argument.option,
        type=_reader(argument),
        choices=argument.choices or None,
        default=argument.default,
        metavar=None if argument.choices else argument.metavar,
        help=argument.help + aside,
    )


def _reader(argument: Argument) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return argument.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return str if argument.choices else read


def _router_type(name: str) -> str:
    try:
        get_router_type(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def load_named_type(argv: Sequence[str]) -> None:
    """Imports the type that ``argv`` names, so that its arguments are known. Raises UsageError if that fails."""
    for group in groups_of(argv):
        option, equals, value = group[0].partition("=")
        values = [value] if equals else group[1:]
        if option == OPTION and len(values) == 1 and values != ["null"]:
            try:
                get_router_type(values[0])
            except ValueError as error:
                raise UsageError(f"argument {OPTION}: {error}") from None


def router_type(args: argparse.Namespace) -> RouterType:
    """The type that ``args`` ask for."""
    return get_router_type(args.moe_router_type)


def routing_config(args: argparse.Namespace, init_method: Callable | None = None) -> RoutingConfig:
    """The router's sizes and choices from parsed arguments. Raises ValueError for what does not go together."""
    options = {argument: getattr(args, argument.dest) for argument in router_type(args).arguments}
    sizes = {"hidden_size": args.hidden_size, "num_experts": null_experts.logits(args), "num_layers": args.num_layers}
    drawn = {} if init_method is None else {"init_method": init_method}
    config = RoutingConfig(**sizes, options=options, moe_layers=_moe_layers(args), **drawn)
    router_type(args).check(config)
    return config


def _moe_layers(args: argparse.Namespace) -> frozenset[int] | None:
    """Layers with experts by ``--moe-layer-freq``, as far as it makes sense: elsewhere it is refused otherwise."""
    frequency = args.moe_layer_freq
    if isinstance(frequency, list):
        return frozenset(index for index, experts in enumerate(frequency) if experts)
    return frozenset(range(0, args.num_layers, frequency)) if frequency > 0 else None


def named(options: set[str]) -> Iterator[Argument]:
    """The router types' arguments among ``options``."""
    return (argument for argument in all_arguments() if argument.option in options)


def check(args: argparse.Namespace) -> None:
    """Refuses arguments of other types than the chosen one, and what does not go together. Raises UsageError."""
    kind = router_type(args)
    for argument in sorted(named(args.explicit), key=lambda argument: argument.option):
        if argument not in kind.arguments:
            raise UsageError(
                f"{argument.option} belongs to {OPTION} {', '.join(owners(argument))}: leave it out with {kind.name}"
            )
    if RESIDUAL in kind.arguments and getattr(args, RESIDUAL.dest):
        _check_residual(args)
    for argument in (SHARE_PROJECTOR, SHARE_HEAD):
        if args.mtp_num_layers and argument in kind.arguments and getattr(args, argument.dest) != argument.default:
            raise UsageError(
                f"{argument.option} does not work with --mtp-num-layers, whose layers are numbered on their own and "
                "belong to no block of the decoder's: leave out one of them"
            )
    if not args.num_experts or None in (args.hidden_size, args.num_layers):
        return  # said elsewhere
    try:
        routing_config(args)
    except ValueError as error:
        counted = f" ({null_experts.named(args)})" * bool(args.moe_null_experts)  # a type sees their sum
        raise UsageError(f"{OPTION} {kind.name}: {error}{counted}") from None


def _check_residual(args: argparse.Namespace) -> None:
    """Refuses what scores that are sums of softmaxes, handed to the host as their logarithms, mean nothing to."""
    kinds = args.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for refused, option, why in (
        *(
            (kind in kinds, f"--moe-router-load-balancing-type {kind}", "it makes other scores of them; use aux_loss")
            for kind in ("sinkhorn", "quantile_balancing")
        ),
        (
            args.moe_router_pre_softmax,
            "--moe-router-pre-softmax",
            "weights would be scores over the sum of all, which grows from layer to layer; leave it out",
        ),
        (
            args.moe_router_score_function != "softmax",
            f"--moe-router-score-function {args.moe_router_score_function}",
            "it adds up scores of a softmax; use softmax",
        ),
        (
            args.moe_z_loss_coeff,
            "--moe-z-loss-coeff",
            "the z-loss of logarithms of scores is a constant; leave it out",
        ),
    ):
        if refused:
            raise UsageError(f"{RESIDUAL.option} does not work with {option}: {why}")
