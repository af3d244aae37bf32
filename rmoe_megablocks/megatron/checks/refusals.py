"""What the router and the experts do not work with, refused by name before anything starts."""

import argparse
import importlib.util

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import balancing
from rmoe_megablocks.megatron.checks import unproven
from rmoe_megablocks.megatron.command_line import router_arguments
from rmoe_megablocks.megatron.experts import backend
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.routing import FAN_IN
from rmoe_megablocks.routing.parts.implementation import TRITON


def installed(module: str) -> bool:
    """Whether ``module`` could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def check_router_arguments(args: argparse.Namespace) -> None:
    """Refuses router options that mean nothing here and features that would drop the state or its gradient."""
    _check_context_parallel(args)
    backend.check_backend(args)
    balancing.check_reduction(args)
    null_experts.check(args)
    options = sorted(argument.option for argument in router_arguments.named(args.explicit))
    replaced = router_arguments.router_type(args).replaces_hosts
    if not args.num_experts:
        if replaced or options:
            option = "--moe-router-type " + args.moe_router_type if replaced else options[0]
            raise UsageError(f"{option}: the model has no experts to route to; set --num-experts")
        return
    router_arguments.check(args)
    if not replaced:
        _check_linear(args)
        _check_graphs(args, replaced)
        return
    check_available(args)
    for refused, option, instead in (*_refusals(args), *unproven.refusals(args)):
        if refused:
            raise UsageError(f"--moe-router-type {args.moe_router_type} does not work with {option}: {instead}")
    _check_graphs(args, replaced)
    stages = args.pipeline_model_parallel_size * _virtual_stages(args)
    alone = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if args.num_layers and args.num_layers + alone < stages and not args.pipeline_model_parallel_layout:
        raise UsageError(
            f"--num-layers {args.num_layers} leaves stages of the {stages} (pipeline x virtual) without a layer; "
            "a routing state needs at least one layer a stage: lower --pipeline-model-parallel-size"
        )


def _check_linear(args: argparse.Namespace) -> None:
    """Refuses models whose linear routers come from somewhere else than where another initialisation is put in."""
    if args.moe_router_init != FAN_IN:
        return
    for refused, option, instead in (
        (args.spec is not None, "--spec", "its layers bring their own router"),
        (args.yaml_cfg is not None, "--yaml-cfg", "use --config or arguments"),
        (args.hybrid_layer_pattern, "--hybrid-layer-pattern", "use init_method"),
        (args.hybrid_override_pattern, "--hybrid-override-pattern", "use init_method"),
        (args.mtp_hybrid_override_pattern, "--mtp-hybrid-override-pattern", "use init_method"),
        (args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized", "use local"),
        (args.experimental_attention_variant, "--experimental-attention-variant", "leave it out"),
        (args.heterogeneous_layers_config_path, "--heterogeneous-layers-config-path", "leave it out"),
        (args.heterogeneous_layers_config_encoded_json, "--heterogeneous-layers-config-encoded-json", "leave it out"),
        (args.init_model_with_meta_device, "--init-model-with-meta-device", "leave it out"),
        (args.moe_use_upcycling, "--moe-use-upcycling", "use init_method"),
    ):
        if refused:
            raise UsageError(f"--moe-router-init {FAN_IN} does not work with {option}: {instead}")


def _check_graphs(args: argparse.Namespace, replaced: bool) -> None:
    """Refuses what Megatron would stop at in the iteration that it captures.

    Its flex dispatcher has ways without a number on the host, of which none was tried with a router that is replaced.
    """
    full = args.cuda_graph_impl == "full_iteration"
    padded = args.moe_expert_capacity_factor and args.moe_pad_expert_input_to_capacity
    option = f"--cuda-graph-impl {args.cuda_graph_impl}"
    for refused, what, instead in (
        (
            full and not padded and (replaced or args.moe_token_dispatcher_type != "flex"),
            f"{option} without padded experts",
            "the host reads how many tokens each expert has, which nothing captured may; add "
            "--moe-expert-capacity-factor and --moe-pad-expert-input-to-capacity, or leave it out",
        ),
        (full and (args.timing_log_level or 0) > 1, f"{option} with --timing-log-level 2", "it waits inside; use 1"),
        (args.cuda_graph_impl != "none" and megatron_cpu.active(), f"{option} without a GPU", "leave it out"),
    ):
        if refused:
            raise UsageError(f"{what} does not work: {instead}")


def _check_context_parallel(args: argparse.Namespace) -> None:
    """Refuses what Megatron stops at an assertion, or would ignore: Transformer Engine takes no mask but causal."""
    option = f"--context-parallel-size {args.context_parallel_size}"
    if args.context_parallel_size == 1:
        return
    if args.transformer_impl == "local" and not megatron_cpu.active():
        raise UsageError(
            f"{option} needs Transformer Engine's attention: install it, or leave out --transformer-impl local"
            if installed("transformer_engine")
            else f"{option} needs Transformer Engine's attention on a GPU: install transformer-engine[pytorch]"
        )
    if args.reset_attention_mask:
        raise UsageError(
            f"--reset-attention-mask does not work with {option}: attention is causal over the whole sequence there; "
            "leave one of them out"
        )


def check_available(args: argparse.Namespace) -> None:
    """Refuses what Megatron would stop at while it builds a model with experts, or in its first forward pass."""
    engine = installed("transformer_engine") and args.transformer_impl != "local"
    leave_out, recompute = "leave it out", "use --recompute-granularity"
    modules = args.recompute_modules or []
    kinds = args.moe_router_load_balancing_type
    coefficient = args.moe_aux_loss_coeff
    for refused, option, instead in (
        (
            args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
            "--tensor-model-parallel-size above 1 with experts",
            "add --sequence-parallel",
        ),
        (
            args.moe_token_dispatcher_type == "flex"
            and (megatron_cpu.active() or (args.moe_flex_dispatcher_backend != "ncclep" and not installed("deep_ep"))),
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
            "layernorm" in modules and not (installed("transformer_engine") or megatron_cpu.active()),
            "--recompute-modules layernorm without Transformer Engine",
            "use other modules",
        ),
        (
            "sinkhorn" in ([kinds] if isinstance(kinds, str) else kinds)
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
    selective = args.recompute_granularity == "selective"
    moe_recompute = args.moe_layer_recompute or (selective and "moe" in (args.recompute_modules or []))
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
    yield (
        args.cuda_graph_impl not in ("none", "full_iteration"),
        "--cuda-graph-impl",
        "a captured layer gives no gradient to what lies outside it, as the shared cell; use full_iteration or none",
    )
    yield (
        args.overlap_moe_expert_parallel_comm,
        "--overlap-moe-expert-parallel-comm",
        "its schedule splits layers apart; leave it out",
    )
    yield args.use_megatron_fsdp, "--use-megatron-fsdp", "use --use-distributed-optimizer"
    yield args.use_torch_fsdp2, "--use-torch-fsdp2", "use --use-distributed-optimizer"
    yield args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized", "use local"
    yield args.hybrid_layer_pattern, "--hybrid-layer-pattern", "only GPT models carry the state"
    yield args.hybrid_override_pattern, "--hybrid-override-pattern", "only GPT models carry the state"
    yield args.experimental_attention_variant, "--experimental-attention-variant", "leave it out"
    yield args.heterogeneous_layers_config_path, "--heterogeneous-layers-config-path", "leave it out"
    yield args.heterogeneous_layers_config_encoded_json, "--heterogeneous-layers-config-encoded-json", "leave it out"
    yield args.moe_use_upcycling, "--moe-use-upcycling", "up-cycle with --moe-router-type linear"
    yield (
        args.init_method_xavier_uniform and args.moe_router_rnn_init == "init_method",
        "--moe-router-rnn-init init_method with --init-method-xavier-uniform",
        "Xavier's bounds are a matrix's, and the recurrent cell has biases; leave one of them out",
    )
    yield (
        args.moe_router_impl == TRITON and megatron_cpu.needed(),
        "--moe-router-impl triton here",
        "its kernels need a CUDA GPU, and torch sees none; use auto",
    )
    yield args.init_model_with_meta_device, "--init-model-with-meta-device", "leave it out"
    yield args.spec is not None, "--spec", "the router brings its own layer specification"
    yield args.yaml_cfg is not None, "--yaml-cfg", "use --config or arguments"
    yield low_precision and moe_recompute, "--recompute-modules moe under fp8 or fp4", "use another --recompute-modules"
