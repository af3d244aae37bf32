"""The arguments that decide a run's size, as Megatron's own parser reads them."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.data import DataError, DatasetMetadata
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.planning import options
from rmoe_megablocks.planning.counts.routing import RoutingCost, measure
from rmoe_megablocks.routing import Argument, all_arguments, get_router_type
from rmoe_megablocks.routing.parts.null_experts import expected_real_experts


@dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Lengths are in elements, batches in sequences. ``moe_layers[i]`` says whether layer i routes, ``routing`` what the
    router takes (None for the host's own), ``not_counted`` which options the figures leave out.
    """

    num_layers: int
    hidden_size: int
    heads: int
    head_size: int
    query_groups: int
    ffn_size: int
    num_experts: int
    expert_ffn_size: int
    shared_expert_size: int
    shared_expert_gate: bool
    moe_layers: tuple[bool, ...]
    topk: int
    null_experts: int
    router_type: str
    routing: RoutingCost | None
    router_dtype_bytes: int
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    layer_norm: bool
    qk_layernorm: bool
    positions: int
    vocab_size: int
    tied: bool
    hidden_dropout: bool
    attention_dropout: bool
    fused_attention: bool
    dtype_bytes: int
    grad_bytes: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool
    distributed_optimizer: bool
    recompute: str
    recompute_modules: tuple[str, ...]
    recompute_method: str
    recompute_num_layers: int
    not_counted: tuple[str, ...] = ()

    @property
    def logits(self) -> int:
        """Logits of a token: E, and M with null experts."""
        return self.num_experts + self.null_experts

    @property
    def most_experts(self) -> int:
        """Real experts of a token, at most."""
        return min(self.topk, self.num_experts)

    @property
    def expected_experts(self) -> float:
        """Real experts of a token: K, and with null experts their mean where routing is balanced."""
        return expected_real_experts(self.topk, self.num_experts, self.null_experts) if self.num_experts else 0

    @property
    def replica(self) -> int:
        """Ranks of one replica, as ``layout_size`` of megatron/arguments.py counts them."""
        return self.pipeline * max(self.tensor * self.context, self.expert * self.expert_tensor)


def read_settings(argv: Sequence[str]) -> Settings:
    """Megatron's command line as :class:`Settings`.

    Raises:
        UsageError: one line about what is missing, unknown or wrong, sizes that do not fit each other, and what
            changes a model in ways that are not computed here.
    """
    args, parser = _parse(argv)
    options.refuse(args, parser)
    missing = [option for option in _NEEDED if getattr(args, options.dest(option)) is None]
    if missing:
        raise UsageError(f"{missing[0]} is missing: neither the configuration nor the command line has it")
    below = [option for option in _POSITIVE if (getattr(args, options.dest(option)) or 0) < 0]
    below += [o for o in _POSITIVE if getattr(args, options.dest(o)) == 0 and o != "--num-experts"]
    if below:
        raise UsageError(f"{below[0]}: must be at least 1, got {getattr(args, options.dest(below[0]))}")
    return _settings(args, options.not_counted(args, parser))


_NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size")
_POSITIVE = (
    *_NEEDED,
    "--ffn-hidden-size",
    "--kv-channels",
    "--num-query-groups",
    "--num-experts",
    "--moe-ffn-hidden-size",
    "--moe-shared-expert-intermediate-size",
    "--moe-router-topk",
    "--max-position-embeddings",
    "--vocab-size",
    "--padded-vocab-size",
    "--make-vocab-size-divisible-by",
    "--global-batch-size",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--recompute-num-layers",
)


def is_argument(option: str) -> bool:
    """Whether Megatron or the package has an argument so spelled."""
    return option in _parser(all_arguments())._option_string_actions


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    _import_megatron()
    from rmoe_megablocks.megatron import arguments
    from rmoe_megablocks.megatron.command_line import router_arguments

    router_arguments.load_named_type(argv)
    return arguments.parse(argv), _parser(all_arguments())


@functools.cache
def _parser(of_routers: tuple[Argument, ...]) -> argparse.ArgumentParser:
    """A parser with ``of_routers`` among its arguments: of all router types known by now."""
    _import_megatron()
    from rmoe_megablocks.megatron import arguments
    from rmoe_megablocks.megatron.command_line import parser

    return parser.build(arguments.add_run_arguments)


def _import_megatron() -> None:
    """Seconds, which the other commands do not need; without its warnings of kernels, which a plan does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        megatron_cpu.install(announce=False)  # nothing runs here
        from rmoe_megablocks.megatron import arguments  # noqa: F401


def _settings(args: argparse.Namespace, not_counted: tuple[str, ...]) -> Settings:
    layers, hidden, heads = args.num_layers, args.hidden_size, args.num_attention_heads
    gated, experts, tensor = args.swiglu, args.num_experts or 0, args.tensor_model_parallel_size
    # arguments.py:1280
    ffn = args.ffn_hidden_size or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    half = args.fp16 or args.bf16
    dtype_bytes = 2 if half else 4
    router_dtype_bytes = {"fp32": 4, "fp64": 8}.get(args.moe_router_dtype, dtype_bytes)
    recompute, modules = _recompute(args)
    fused = args.transformer_impl == "transformer_engine" and half and args.attention_backend.name != "unfused"
    settings = Settings(
        num_layers=layers,
        hidden_size=hidden,
        heads=heads,
        head_size=args.kv_channels or hidden // heads,
        query_groups=args.num_query_groups if args.group_query_attention else heads,
        ffn_size=ffn,
        num_experts=experts,
        expert_ffn_size=args.moe_ffn_hidden_size or ffn,
        shared_expert_size=args.moe_shared_expert_intermediate_size or 0,
        shared_expert_gate=args.moe_shared_expert_gate,
        moe_layers=_moe_layers(args.moe_layer_freq, layers) if experts else (False,) * layers,
        topk=args.moe_router_topk,
        null_experts=args.moe_null_experts,
        router_type=args.moe_router_type,
        routing=_routing(args, dtype_bytes, router_dtype_bytes) if experts else None,
        router_dtype_bytes=router_dtype_bytes,
        gated=gated,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_bias_linear or args.add_qkv_bias,
        layer_norm=args.normalization == "LayerNorm",
        qk_layernorm=args.qk_layernorm,
        positions=_positions(args),
        vocab_size=_vocabulary(args, tensor),
        tied=not args.untie_embeddings_and_output_weights,
        hidden_dropout=args.hidden_dropout > 0,
        attention_dropout=args.attention_dropout > 0,
        fused_attention=fused,
        dtype_bytes=dtype_bytes,
        grad_bytes=_grad_bytes(args),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size or 0,
        tensor=tensor,
        pipeline=args.pipeline_model_parallel_size,
        virtual=_virtual(args),
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or tensor,
        sequence_parallel=args.sequence_parallel and tensor > 1,
        distributed_optimizer=args.use_distributed_optimizer,
        recompute=recompute,
        recompute_modules=modules,
        recompute_method=args.recompute_method or "",
        recompute_num_layers=args.recompute_num_layers or 1,
        not_counted=not_counted,
    )
    _check_model(args, settings)
    return settings


def _check_model(args: argparse.Namespace, s: Settings) -> None:
    """Sizes of the model that do not fit each other, whatever the layout."""
    for wrong, line in (
        (
            not args.kv_channels and s.hidden_size % s.heads,
            f"--hidden-size {s.hidden_size} is not a multiple of --num-attention-heads {s.heads}, and no --kv-channels",
        ),
        (
            s.heads % s.query_groups,
            f"--num-attention-heads {s.heads} is not a multiple of --num-query-groups {s.query_groups}",
        ),
        (
            s.null_experts and not s.num_experts,
            f"--moe-null-experts {s.null_experts}: the model has no experts to route to; set --num-experts",
        ),
        (
            s.num_experts and s.topk > s.logits,
            f"--moe-router-topk {s.topk} is more than --num-experts {s.num_experts}"
            + f" and --moe-null-experts {s.null_experts}" * bool(s.null_experts),
        ),
        (
            s.positions and s.positions < s.seq_length,
            f"--seq-length {s.seq_length} exceeds --max-position-embeddings {s.positions}",
        ),
        (s.shared_expert_gate and not s.shared_expert_size, "--moe-shared-expert-gate without a shared expert"),
        (
            not s.num_experts and get_router_type(s.router_type).replaces_hosts,
            f"--moe-router-type {s.router_type}: the model has no experts to route to; set --num-experts",
        ),
        (args.bf16 and args.fp16, "--fp16 and --bf16 exclude each other"),
    ):
        if wrong:
            raise UsageError(line)


def _routing(args: argparse.Namespace, dtype_bytes: int, router_dtype_bytes: int) -> RoutingCost | None:
    router_type = get_router_type(args.moe_router_type)
    if not router_type.replaces_hosts:
        return None
    from rmoe_megablocks.megatron.command_line import router_arguments

    try:
        config = router_arguments.routing_config(args)
    except ValueError as error:
        raise UsageError(f"--moe-router-type {args.moe_router_type}: {error}") from None
    return measure(router_type, config, dtype_bytes, router_dtype_bytes)


def _positions(args: argparse.Namespace) -> int:
    """Learned positions, which are parameters; the other kinds known here have none."""
    kind = args.position_embedding_type
    if kind not in ("learned_absolute", "rope", "none"):
        raise UsageError(f"rmoe plan cannot compute with --position-embedding-type {kind}; use rope")
    if kind != "learned_absolute":
        return 0
    if args.max_position_embeddings is None:
        raise UsageError("--max-position-embeddings is missing: learned positions need it")
    return args.max_position_embeddings


def _grad_bytes(args: argparse.Namespace) -> int:
    """Megatron sums bf16 gradients in fp32 unless told otherwise (arguments.py:1192), fp16 ones only if told."""
    if args.bf16:
        return 2 if args.grad_reduce_in_bf16 else 4
    return 2 if args.fp16 and not args.accumulate_allreduce_grads_in_fp32 else 4


def _recompute(args: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    granularity = "selective" if args.recompute_activations else args.recompute_granularity
    modules = tuple(args.recompute_modules or ()) or ("core_attn",)  # arguments.py: selective's default
    unknown = [module for module in modules if module not in options.RECOMPUTE_MODULES]
    if granularity == "selective" and unknown:
        raise UsageError(f"rmoe plan cannot compute with --recompute-modules {unknown[0]}")
    return granularity or "none", modules if granularity == "selective" else ()


def _virtual(args: argparse.Namespace) -> int:
    per_stage, stages = args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank
    if per_stage and stages:
        raise UsageError(
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank say the same: give one"
        )
    if not per_stage:
        return stages or 1
    layers, pipeline = args.num_layers, args.pipeline_model_parallel_size
    if layers % (pipeline * per_stage):
        raise UsageError(
            f"--num-layers {layers} is not a multiple of --num-layers-per-virtual-pipeline-stage {per_stage} "
            f"times --pipeline-model-parallel-size {pipeline}"
        )
    return layers // pipeline // per_stage


def _moe_layers(frequency: int | list, layers: int) -> tuple[bool, ...]:
    """``--moe-layer-freq``: every N-th layer from the first on, or a list such as ([0]*1+[1]*23)."""
    if isinstance(frequency, int) and frequency > 0:
        return tuple(index % frequency == 0 for index in range(layers))
    if isinstance(frequency, list) and len(frequency) == layers and set(frequency) <= {0, 1}:
        return tuple(bool(item) for item in frequency)
    raise UsageError(f"--moe-layer-freq: {frequency!r} is neither a number nor a list of {layers} zeros and ones")


def _vocabulary(args: argparse.Namespace, tensor: int) -> int:
    """Rows of the embedding: as given, or padded as training/vocab_utils.py pads a tokenizer's."""
    if args.padded_vocab_size:
        return args.padded_vocab_size
    size = args.vocab_size
    data = (args.data_path, args.data_args_path, args.per_split_data_args_path, args.train_data_path, args.mock_data)
    if size is None and not any(data):
        size = _dataset_vocabulary(args.dataset)
    if size is None:
        raise UsageError("the vocabulary's size is not known: give --vocab-size or --padded-vocab-size")
    multiple = args.make_vocab_size_divisible_by * tensor
    return -(-size // multiple) * multiple


def _dataset_vocabulary(folder: str | None) -> int:
    if folder is None:
        return 256  # the embedded excerpt of enwik8, byte by byte
    try:
        return DatasetMetadata.load(Path(folder)).vocab_size
    except DataError as error:
        raise UsageError(f"--dataset: {error}; or give --vocab-size") from None
