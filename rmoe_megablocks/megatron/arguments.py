"""Our arguments among Megatron's, the defaults of a run, and what is refused before training starts."""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

from rmoe_megablocks.command_line import program_arguments
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import balancing, parser, unproven
from rmoe_megablocks.megatron.experts import backend
from rmoe_megablocks.routing import get_router_type, router_types
from rmoe_megablocks.routing.config import RNN_INITS

_LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are a little longer


def add_router_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the router's arguments; usable as Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("recurrent router")
    group.add_argument(
        "--moe-router-type",
        choices=router_types(),
        default="linear",
        help="How router logits come about. "
        + "; ".join(f"{name}: {get_router_type(name).summary}" for name in router_types()),
    )
    group.add_argument(
        "--moe-router-rnn-hidden-size",
        type=_positive,
        default=128,
        metavar="P",
        help="Width of the routing state that a recurrent router hands from layer to layer.",
    )
    group.add_argument(
        "--moe-router-rnn-bias",
        action="store_true",
        help="Biases in a recurrent router's projectors and router matrices.",
    )
    group.add_argument(
        "--moe-router-rnn-init",
        choices=RNN_INITS,
        default="standard",
        help="Initialisation of the recurrent cell, weights and biases alike: uniform in +-1/sqrt(P), which is "
        "torch's and the 0.91B run's, or the model's own (--init-method-std), which is the released code's.",
    )
    group.add_argument(
        "--moe-router-upcycle",
        action="store_true",
        help="Start a recurrent model from the weights of a linear checkpoint (--load or --pretrained-checkpoint); "
        "routing, optimizer, data and iteration start afresh.",
    )
    balancing.add_reduction_argument(group)
    backend.add_backend_argument(parser.add_argument_group("experts"))
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the router's arguments and those of our own entry (:mod:`.pretrain`)."""
    parser = add_router_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--run-name", default="run", help="Name of the run. The launcher names it by configuration and command line."
    )
    group.add_argument(
        "--runs-dir", default="runs", help="Folder of all runs; this one's files go to RUNS_DIR/RUN_NAME."
    )
    group.add_argument(
        "--dataset",
        metavar="DIR",
        help="Folder made by 'rmoe data prepare'. Without any data argument: the embedded excerpt of enwik8.",
    )
    group.add_argument("--no-checkpoints", action="store_true", help="Save none, for measurements and trials.")
    group.add_argument(
        "--no-verify-integrity",
        action="store_true",
        help="Save and load torch_dist checkpoints without hashing their files (see docs/checkpoints.md).",
    )
    group.add_argument(
        "--no-final-evaluation",
        action="store_true",
        help="Leave out the exact evaluation of the validation and test splits that ends a run.",
    )
    group.add_argument(
        "--eval-tokens",
        type=_positive,
        metavar="N",
        help="Evaluate only the first N tokens of each split at the end; the figures are marked as partial.",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: Sequence[str], add_arguments=add_run_arguments) -> argparse.Namespace:
    """Parses ``argv`` with Megatron's parser and ours. Raises UsageError for what neither knows.

    Besides Megatron's arguments the result has ``explicit``, the names in ``argv``, ``argv``, checked (:mod:`.parser`),
    and ``as_config``, the same as a configuration file spells it.
    """
    prepared: list[argparse.ArgumentParser] = []

    def extra_args_provider(megatrons: argparse.ArgumentParser) -> argparse.ArgumentParser:
        own = parser.with_usage_errors(add_arguments(megatrons))
        prepared.append(own)
        sys.argv[1:] = parser.check(argv, own)  # what parse_args parses next
        return own

    with program_arguments(argv):
        args = parse_args(extra_args_provider)
        args.argv = sys.argv[1:]
    args.as_config = parser.as_config(args.argv, prepared[0], args)
    args.explicit = _named_options(args.argv)
    return args


def _named_options(argv: Sequence[str]) -> set[str]:
    return {word.split("=", 1)[0] for word in argv if word.startswith("--")}


def validate(args: argparse.Namespace) -> None:
    """Refuses what cannot work, then runs Megatron's own validation. Raises UsageError with one line either way."""
    check_router_arguments(args)
    if args.lr_warmup_iters and args.train_iters and args.lr_warmup_iters >= (args.lr_decay_iters or args.train_iters):
        raise UsageError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be below --lr-decay-iters or --train-iters "
            f"({args.lr_decay_iters or args.train_iters}); use --lr-warmup-fraction for runs of any length"
        )
    try:
        validate_args(args, {})
        core_transformer_config_from_args(args)  # its checks come too late for one line: every rank would print them
    except (AssertionError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(text or f"Megatron refuses these arguments ({type(error).__name__})") from error


def fill_defaults(args: argparse.Namespace) -> list[str]:
    """Chooses what this machine can run where the user did not say. Returns a line for each choice worth telling."""
    told = []
    if args.transformer_impl == "transformer_engine" and not _installed("transformer_engine"):
        if "--transformer-impl" in args.explicit:
            raise UsageError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; leave the argument out"
            )
        args.transformer_impl = "local"
        told.append("Transformer Engine is not installed: --transformer-impl local")
    if args.transformer_impl == "local":
        args.attention_backend = AttnBackend.unfused
        args.apply_rope_fusion = False
    if not _installed("fused_layer_norm_cuda"):  # NVIDIA's Apex; PyPI's apex is something else
        args.no_persist_layer_norm = True
    if not _installed("fused_weight_gradient_mlp_cuda"):
        args.gradient_accumulation_fusion = False
    if not _installed("scaled_upper_triang_masked_softmax_cuda"):
        args.masked_softmax_fusion = False
    if megatron_cpu.active():
        args.distributed_backend = "gloo"
    if args.expert_tensor_parallel_size is None:  # Megatron's default, or 1 for experts that cannot be split
        args.expert_tensor_parallel_size = backend.expert_tensor_size(args)
    if not (args.reset_attention_mask or "--create-attention-mask-in-dataloader" in args.explicit):
        args.create_attention_mask_in_dataloader = False  # attention is causal anyway
    if args.async_save and args.async_strategy == "nvrx" and not _installed("nvidia_resiliency_ext"):
        if "--async-strategy" in args.explicit:
            raise UsageError(
                "--async-strategy nvrx: nvidia-resiliency-ext is not installed; use --async-strategy mcore"
            )
        args.async_strategy = "mcore"
        told.append("nvidia-resiliency-ext is not installed: --async-strategy mcore")
    if "--no-exit-signal-handler" not in args.explicit:
        args.exit_signal_handler = True  # Ctrl-C and SIGTERM save a checkpoint
    return told


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def layout_size(args: argparse.Namespace) -> int:
    """Number of processes that one replica of the model takes: TP x PP x CP, or what its experts need if more."""
    dense = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    experts = args.expert_model_parallel_size * backend.expert_tensor_size(args) * args.pipeline_model_parallel_size
    return max(dense, experts)


def check_router_arguments(args: argparse.Namespace) -> None:
    """Refuses router options that mean nothing here and features that would drop the state or its gradient."""
    _check_context_parallel(args)
    backend.check_backend(args)
    balancing.check_reduction(args)
    options = sorted(option for option in args.explicit if option.startswith("--moe-router-rnn-"))
    recurrent = get_router_type(args.moe_router_type).recurrent
    if not args.num_experts:
        if recurrent or options:
            option = "--moe-router-type " + args.moe_router_type if recurrent else options[0]
            raise UsageError(f"{option}: the model has no experts to route to; set --num-experts")
        return
    if not recurrent:
        return
    check_available(args)
    for refused, option, instead in (*_refusals(args), *unproven.refusals(args)):
        if refused:
            raise UsageError(f"--moe-router-type {args.moe_router_type} does not work with {option}: {instead}")
    stages = args.pipeline_model_parallel_size * _virtual_stages(args)
    alone = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if args.num_layers and args.num_layers + alone < stages and not args.pipeline_model_parallel_layout:
        raise UsageError(
            f"--num-layers {args.num_layers} leaves stages of the {stages} (pipeline x virtual) without a layer; "
            "a routing state needs at least one layer a stage: lower --pipeline-model-parallel-size"
        )


def _check_context_parallel(args: argparse.Namespace) -> None:
    """Refuses what Megatron stops at an assertion, or would ignore: Transformer Engine takes no mask but causal."""
    option = f"--context-parallel-size {args.context_parallel_size}"
    if args.context_parallel_size == 1:
        return
    if args.transformer_impl == "local" and not megatron_cpu.active():
        raise UsageError(
            f"{option} needs Transformer Engine's attention: install it, or leave out --transformer-impl local"
            if _installed("transformer_engine")
            else f"{option} needs Transformer Engine's attention on a GPU: install transformer-engine[pytorch]"
        )
    if args.reset_attention_mask:
        raise UsageError(
            f"--reset-attention-mask does not work with {option}: attention is causal over the whole sequence there; "
            "leave one of them out"
        )


def check_available(args: argparse.Namespace) -> None:
    """Refuses what Megatron would stop at while it builds a model with experts, or in its first forward pass."""
    engine = _installed("transformer_engine") and args.transformer_impl != "local"
    leave_out, recompute = "leave it out", "use --recompute-granularity"
    modules = args.recompute_modules or []
    balancing = args.moe_router_load_balancing_type
    coefficient = args.moe_aux_loss_coeff
    for refused, option, instead in (
        (
            args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
            "--tensor-model-parallel-size above 1 with experts",
            "add --sequence-parallel",
        ),
        (
            args.moe_token_dispatcher_type == "flex"
            and (megatron_cpu.active() or (args.moe_flex_dispatcher_backend != "ncclep" and not _installed("deep_ep"))),
            "--moe-token-dispatcher-type flex without DeepEP and a GPU",
            "use alltoall",
        ),
        (args.moe_router_fusion and not engine, "--moe-router-fusion without Transformer Engine", leave_out),
        (
            args.cpu_offloading_num_layers and not engine,
            "--cpu-offloading-num-layers without Transformer Engine",
            recompute,
        ),
        (
            args.moe_latent_size is not None and not engine,
            "--moe-latent-size without Transformer Engine",
            leave_out,
        ),
        (
            "layernorm" in modules and not (_installed("transformer_engine") or megatron_cpu.active()),
            "--recompute-modules layernorm without Transformer Engine",
            "use other modules",
        ),
        (
            "sinkhorn" in ([balancing] if isinstance(balancing, str) else balancing)
            and any(coefficient if isinstance(coefficient, list) else [coefficient]),
            "--moe-router-load-balancing-type sinkhorn with an auxiliary loss",
            "set --moe-aux-loss-coeff 0",
        ),
        (
            args.multi_latent_attention and args.transformer_impl == "local",
            "--multi-latent-attention without Transformer Engine",
            leave_out,
        ),
    ):
        if refused:
            raise UsageError(f"{option} does not work: {instead}")


def _virtual_stages(args: argparse.Namespace) -> int:
    if args.num_virtual_stages_per_pipeline_rank:
        return args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage:
        per_rank = args.num_layers // args.pipeline_model_parallel_size
        return max(1, per_rank // args.num_layers_per_virtual_pipeline_stage)
    return 1


def _mtp_alone(args: argparse.Namespace) -> bool:
    """Whether a stage before the last one ends in multi-token prediction: its message holds several hidden states."""
    layout = args.pipeline_model_parallel_layout
    return isinstance(layout, str) and "m" in layout.rpartition("|")[0]


def _refusals(args: argparse.Namespace):
    """(whether it applies, the option, what to use instead)."""
    local = args.transformer_impl == "local"
    yield (
        local and args.add_bias_linear,
        "biases in Megatron's experts, which cannot train",
        "add --disable-bias-linear",
    )
    low_precision = bool(args.fp8 or args.fp4)
    moe_recompute = args.recompute_granularity == "selective" and "moe" in (args.recompute_modules or [])
    yield (
        _mtp_alone(args),
        "--pipeline-model-parallel-layout with multi-token prediction (m) before the last stage",
        "put m on the stage of the loss (L)",
    )
    yield args.mtp_hybrid_override_pattern, "--mtp-hybrid-override-pattern", "only GPT layers carry the state"
    yield (
        args.moe_routing_trace_capture_logits,
        "--moe-routing-trace-capture-logits",
        "it computes them a second time, without the layer's state; trace without",
    )
    yield (
        args.moe_routing_trace_dump_weights,
        "--moe-routing-trace-dump-weights",
        "there is no single router matrix to dump; take it from a checkpoint",
    )
    yield args.cuda_graph_impl != "none", "--cuda-graph-impl", "captured layers cannot take the state; use none"
    yield (
        args.overlap_moe_expert_parallel_comm,
        "--overlap-moe-expert-parallel-comm",
        "its schedule splits layers apart; leave it out",
    )
    yield args.use_megatron_fsdp, "--use-megatron-fsdp", "use --use-distributed-optimizer"
    yield args.use_torch_fsdp2, "--use-torch-fsdp2", "use --use-distributed-optimizer"
    yield args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized", "use local"
    yield args.hybrid_layer_pattern, "--hybrid-layer-pattern", "only GPT models carry the state"
    yield args.experimental_attention_variant, "--experimental-attention-variant", "leave it out"
    yield args.heterogeneous_layers_config_path, "--heterogeneous-layers-config-path", "leave it out"
    yield args.moe_use_upcycling, "--moe-use-upcycling", "up-cycle with --moe-router-type linear"
    yield (
        args.init_method_xavier_uniform and args.moe_router_rnn_init == "init_method",
        "--moe-router-rnn-init init_method with --init-method-xavier-uniform",
        "Xavier's bounds are a matrix's, and the recurrent cell has biases; leave one of them out",
    )
    yield args.init_model_with_meta_device, "--init-model-with-meta-device", "leave it out"
    yield args.spec is not None, "--spec", "the router brings its own layer specification"
    yield args.yaml_cfg is not None, "--yaml-cfg", "use --config or arguments"
    yield low_precision and moe_recompute, "--recompute-modules moe under fp8 or fp4", "use another --recompute-modules"


def check_writable(folder: Path, option: str, make: bool = True) -> None:
    """Makes ``folder`` and proves that files can be made in it, on all ranks at once. Raises UsageError otherwise.

    Without ``make`` the proof is done where ``folder`` would be, and leaves nothing behind.
    """
    place = folder
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        while not os.path.lexists(place):  # a link to nowhere is in the way
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {folder} ({error.strerror})") from error


def check_run_name(name: str) -> None:
    """Refuses what is no folder's name. Raises UsageError."""
    if "/" in name or name in (".", ".."):
        raise UsageError(f"--run-name {name}: expected a name, not a path; --runs-dir names the folder of all runs")
    if name != name.strip() or not name.isprintable():
        raise UsageError(f"--run-name {name!r}: has blanks around it, or characters that cannot be shown")
    if len(name.encode()) > _LONGEST_NAME:
        raise UsageError(f"--run-name {name[:40]}...: has {len(name.encode())} bytes, {_LONGEST_NAME} are the limit")
