"""MegaBlocks' arguments with those of the router, and what they must satisfy."""

from __future__ import annotations

import dataclasses

import megablocks
import torch
from megablocks.layers import mpu

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import INIT_METHOD, RouterType, RoutingConfig, get_router_type

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
        moe_router_type: a name from :func:`rmoe_megablocks.routing.router_types`.
        moe_router_rnn_hidden_size: P, width of the routing state.
        moe_router_rnn_bias: whether projector and router have biases.
        moe_router_rnn_init: see ``rnn_init`` of :class:`rmoe_megablocks.routing.RoutingConfig`.
        moe_router_init: see ``layer_init`` there; with ``linear`` the default alone.
        moe_router_dtype: ``"fp32"`` routes in fp32 in a model of another dtype; None in the dtype of the input.
    """

    mlp_impl: str = "grouped"
    device: int | torch.device = dataclasses.field(default_factory=_default_device)
    moe_router_type: str = "linear"
    moe_router_rnn_hidden_size: int = 128
    moe_router_rnn_bias: bool = False
    moe_router_rnn_init: str = "standard"
    moe_router_init: str = INIT_METHOD
    moe_router_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from rmoe_megablocks.megablocks.layer import register  # imports this module

        register()  # a dMoE of these arguments must not silently get MegaBlocks' own router


_ROUTER_FIELDS = {field.name: field.default for field in dataclasses.fields(Arguments) if "moe_router" in field.name}


def router_option(args: megablocks.Arguments, name: str):
    """A router argument; its default where ``args`` has none, as MegaBlocks' own Arguments."""
    return getattr(args, name, _ROUTER_FIELDS[name])


def router_type(args: megablocks.Arguments) -> RouterType:
    """The router that ``args`` ask for. Raises ValueError that lists the known ones."""
    return get_router_type(router_option(args, "moe_router_type"))


def routing_config(args: megablocks.Arguments) -> RoutingConfig:
    """Sizes and initialisation of the router. Raises ValueError for a size below 1 or an unknown initialisation."""
    return RoutingConfig(
        hidden_size=args.hidden_size,
        num_experts=args.moe_num_experts,
        state_size=router_option(args, "moe_router_rnn_hidden_size"),
        bias=router_option(args, "moe_router_rnn_bias"),
        rnn_init=router_option(args, "moe_router_rnn_init"),
        layer_init=router_option(args, "moe_router_init"),
        init_method=args.init_method,
    )


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
    if router_option(args, "moe_router_init") != INIT_METHOD and not router_type(args).recurrent:
        raise UsageError(
            f"moe_router_init={args.moe_router_init!r} does not work with moe_router_type='linear', MegaBlocks' own "
            "router: leave it out, and for torch.nn.Linear's initialisation call layer.router.layer.reset_parameters()"
        )
    if args.fp16 and args.bf16:
        raise UsageError("fp16 and bf16 are both True, and MegaBlocks would take fp16 (its default): set one to False")
    if args.num_layers < 1:
        raise UsageError(f"num_layers must be at least 1, got {args.num_layers}")
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
