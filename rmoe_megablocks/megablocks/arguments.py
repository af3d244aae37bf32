"""MegaBlocks' arguments with those of the router, and what they must satisfy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import megablocks
import torch
from megablocks.layers import mpu

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import (
    BIAS,
    INIT,
    INIT_METHOD,
    LINEAR,
    RESIDUAL,
    RNN_INIT,
    STATE_SIZE,
    RouterType,
    RoutingConfig,
    all_arguments,
    get_router_type,
    owners,
)

# int(ceil(log2(0))) is what ParallelDroplessMLP computes below one block of its sparse matrix, used or not.
_BLOCK = 128


def _default_device() -> torch.device:
    return torch.device("cpu") if megatron_cpu.needed() else torch.device("cuda", torch.cuda.current_device())


@dataclasses.dataclass
class Arguments(megablocks.Arguments):
    """``megablocks.Arguments`` and the choice of a router. Making one does :func:`.register`.

    Other defaults than upstream's: ``mlp_impl="grouped"``, since upstream refuses the sparse one with every current
    Triton, and ``device``, which is the CPU where there is no GPU. The losses of a recurrent layer are computed in
    fp32, whatever ``moe_lbl_in_fp32`` and ``moe_zloss_in_fp32`` say.

    ``linear`` is MegaBlocks' own router, drawn by ``init_method``.

    Args:
        moe_router_type: a name from :func:`rmoe_megablocks.routing.router_types`, or ``module:Class``.
        moe_router_rnn_hidden_size: P, width of the routing state.
        moe_router_rnn_bias: whether projector and router have biases.
        moe_router_rnn_init: how a recurrent cell is drawn, as ``--moe-router-rnn-init``.
        moe_router_init: how what a layer owns is drawn, as ``--moe-router-init``; with ``linear`` the default alone.
        moe_router_options: the type's other arguments by name, ``{"moe_router_recurrence": "detach"}``: those that
            ``get_router_type(name).arguments`` lists. What the type does not take is refused, here and in the four
            fields above.
        moe_null_experts: as ``--moe-null-experts``, which Megatron's layers alone have: refused unless 0.
        moe_router_dtype: ``"fp32"`` routes in fp32 in a model of another dtype; None in the dtype of the input.
    """

    mlp_impl: str = "grouped"
    device: int | torch.device = dataclasses.field(default_factory=_default_device)
    moe_router_type: str = "linear"
    moe_router_rnn_hidden_size: int = STATE_SIZE.default
    moe_router_rnn_bias: bool = BIAS.default
    moe_router_rnn_init: str = RNN_INIT.default
    moe_router_init: str = INIT.default
    moe_router_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    moe_router_dtype: str | None = None
    moe_null_experts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        from rmoe_megablocks.megablocks.layer import register  # imports this module

        register()  # a dMoE of these arguments must not silently get MegaBlocks' own router


_FIELDS = {argument.dest: argument for argument in (STATE_SIZE, BIAS, RNN_INIT, INIT)}
_OTHERS = {"moe_router_type": LINEAR, "moe_router_dtype": None, "moe_router_options": {}}


def router_option(args: megablocks.Arguments, name: str):
    """A router argument; its default where ``args`` has none, as MegaBlocks' own Arguments."""
    return getattr(args, name, _FIELDS[name].default if name in _FIELDS else _OTHERS[name])


def router_type(args: megablocks.Arguments) -> RouterType:
    """The router that ``args`` ask for. Raises UsageError that lists the known ones."""
    name = router_option(args, "moe_router_type")
    if not isinstance(name, str):
        raise UsageError(f"moe_router_type must be a name, got {name!r}")
    try:
        return get_router_type(name)
    except ValueError as error:
        raise UsageError(f"moe_router_type: {error}") from None


def routing_config(args: megablocks.Arguments) -> RoutingConfig:
    """Sizes and choices of the router. Raises UsageError for what it does not take, or what does not go together."""
    kind = router_type(args)
    own = {argument.dest: argument for argument in kind.arguments}
    given = {name: router_option(args, name) for name in _FIELDS}
    given = {name: value for name, value in given.items() if name in own or value != _FIELDS[name].default}
    given |= _further_options(args)
    for name in given:
        if name not in own:
            belongs = [owner for argument in all_arguments() if argument.dest == name for owner in owners(argument)]
            belongs = f" but of {', '.join(belongs)}" if belongs else ""
            raise UsageError(
                f"{name} is no argument of moe_router_type={kind.name!r}{belongs}: leave it out "
                f"({kind.name} takes {', '.join(own)})"
            )
    try:
        config = RoutingConfig(
            hidden_size=args.hidden_size,
            num_experts=args.moe_num_experts,
            options={own[name]: value for name, value in given.items()},
            num_layers=args.num_layers,
            init_method=args.init_method,
        )
        kind.check(config)
    except ValueError as error:
        raise UsageError(f"moe_router_type={kind.name!r}: {error}") from None
    return config


def _further_options(args: megablocks.Arguments) -> Mapping[str, Any]:
    options = router_option(args, "moe_router_options")
    if not isinstance(options, Mapping):
        raise UsageError(f"moe_router_options must be a dictionary of names and values, got {options!r}")
    for name in options:
        if name in _FIELDS:
            raise UsageError(f"moe_router_options: {name} is a field of Arguments, set it there")
    return options


def router_dtype(args: megablocks.Arguments) -> torch.dtype | None:
    """Dtype of the routing arithmetic, None for that of the input."""
    return {None: None, "fp32": torch.float32}[router_option(args, "moe_router_dtype")]


def check_arguments(args: megablocks.Arguments, dropless: bool) -> None:
    """Raises UsageError for what would fail in the middle of MegaBlocks, or compute something else than asked for.

    Args:
        args: the arguments of a layer.
        dropless: whether they are for a dMoE rather than a MoE.
    """
    experts, top_k, features = args.moe_num_experts, args.moe_top_k, args.ffn_hidden_size
    if not 1 <= top_k <= experts:
        raise UsageError(f"moe_top_k must be between 1 and moe_num_experts ({experts}), got {top_k}")
    if router_option(args, "moe_router_dtype") not in (None, "fp32"):
        raise UsageError(f"moe_router_dtype must be None or 'fp32', got {args.moe_router_dtype!r}")
    if router_option(args, "moe_router_init") != INIT_METHOD and not router_type(args).replaces_hosts:
        raise UsageError(
            f"moe_router_init={args.moe_router_init!r} does not work with moe_router_type='linear', MegaBlocks' own "
            "router: leave it out, and for torch.nn.Linear's initialisation call layer.router.layer.reset_parameters()"
        )
    residual = router_type(args).replaces_hosts and routing_config(args)[RESIDUAL]
    if residual and not args.moe_normalize_expert_weights:
        raise UsageError(
            f"{RESIDUAL.dest} needs moe_normalize_expert_weights: weights would be scores over the sum of all, which "
            "grows from layer to layer"
        )
    if residual and args.moe_zloss_weight:
        raise UsageError(
            f"{RESIDUAL.dest} does not work with moe_zloss_weight: the z-loss of logarithms of scores is a constant; "
            "leave it out"
        )
    if getattr(args, "moe_null_experts", 0):
        raise UsageError(
            f"moe_null_experts={args.moe_null_experts!r} does not work with MegaBlocks' own layers, which give every "
            "token moe_top_k experts: leave it out, or train with Megatron and --moe-backend megablocks"
        )
    if args.fp16 and args.bf16:
        raise UsageError("fp16 and bf16 are both True, and MegaBlocks would take fp16 (its default): set one to False")
    routing_config(args)
    if args.shared_expert and args.bias and args.return_bias:
        raise UsageError("shared_expert does not work with a returned bias: set bias or return_bias to False")
    shards = 1
    if args.moe_expert_model_parallelism:
        if not torch.distributed.is_initialized():
            raise UsageError("moe_expert_model_parallelism needs torch.distributed.init_process_group")
        ranks = mpu.get_expert_parallel_world_size(args)
        if max(ranks, experts) % min(ranks, experts):
            raise UsageError(f"moe_num_experts ({experts}) cannot be spread evenly over {ranks} expert parallel ranks")
        shards = max(1, ranks // experts)  # more ranks than experts share an expert's features
        if features % shards:
            raise UsageError(f"ffn_hidden_size ({features}) cannot be spread evenly over {shards} ranks an expert")
    if dropless and features // shards * experts < _BLOCK:
        raise UsageError(
            f"ffn_hidden_size ({features // shards} a rank) times moe_num_experts ({experts}) must be at least "
            f"{_BLOCK} in a dMoE"
        )
