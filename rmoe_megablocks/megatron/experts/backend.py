"""Which library computes the experts (``--moe-backend``), and what MegaBlocks' experts cannot be combined with."""

import argparse
import importlib.metadata
import importlib.util

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.null_experts import options as null_experts

MEGATRON, MEGABLOCKS = BACKENDS = ("megatron", "megablocks")


def add_backend_argument(group) -> None:
    """Adds ``--moe-backend`` to a group of arguments."""
    group.add_argument(
        "--moe-backend",
        choices=BACKENDS,
        default=MEGATRON,
        help="What computes the experts: Megatron's own modules, or MegaBlocks' dropless grouped experts, which need "
        "no Transformer Engine (installed by 'rmoe install megablocks'). Checkpoints are interchangeable.",
    )


def expert_tensor_size(args: argparse.Namespace) -> int:
    """Ranks that one expert is split over. MegaBlocks' experts are not, where Megatron's default is the TP size."""
    default = 1 if args.moe_backend == MEGABLOCKS else args.tensor_model_parallel_size
    return args.expert_tensor_parallel_size or default


def check_backend(args: argparse.Namespace) -> None:
    """Refuses what MegaBlocks' experts cannot do, in one line. Raises UsageError."""
    if args.moe_backend != MEGABLOCKS:
        return
    if not args.num_experts:
        raise UsageError("--moe-backend megablocks: the model has no experts; set --num-experts")
    missing = [module for module in ("megablocks", "stk") if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"--moe-backend megablocks: {' and '.join(missing)} not installed; run 'rmoe install megablocks'"
        )
    _check_sizes(args)
    for refused, option, instead in _refusals(args):
        if refused:
            raise UsageError(f"--moe-backend megablocks does not work with {option}: {instead}")


def _check_sizes(args: argparse.Namespace) -> None:
    experts, ranks = args.num_experts, args.expert_model_parallel_size
    if experts % ranks:
        raise UsageError(
            f"--moe-backend megablocks: --num-experts {experts} cannot be shared out evenly among "
            f"--expert-model-parallel-size {ranks} ranks"
        )
    if args.moe_router_topk > null_experts.logits(args):
        raise UsageError(
            f"--moe-router-topk {args.moe_router_topk}: there are only {null_experts.named(args)} to choose from"
        )
    ffn = args.moe_ffn_hidden_size or args.ffn_hidden_size
    # MegaBlocks takes the logarithm of their number of 128-wide blocks, grouped or not (dmoe.py, max_column_index)
    if ffn and ffn * experts < 128:
        raise UsageError(
            f"--moe-ffn-hidden-size {ffn} x --num-experts {experts} = {ffn * experts} is less than the 128 that "
            "MegaBlocks needs: use larger experts or --moe-backend megatron"
        )


def _compiled_grouped_gemm() -> bool:
    """Whether MegaBlocks will find the user's own build, which multiplies bf16 alone."""
    return not megatron_cpu.active() and any(
        (distribution.name or "").lower().replace("-", "_") == "grouped_gemm"
        for distribution in importlib.metadata.distributions()
    )


def _refusals(args: argparse.Namespace):
    """(whether it applies, the option, what to do instead)."""
    megatron = "use --moe-backend megatron"
    leave_out = f"leave it out, or {megatron}"
    balancing = args.moe_router_load_balancing_type
    yield (
        (args.expert_tensor_parallel_size or 1) > 1,
        f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size}",
        "its experts are whole; use 1 and spread them with --expert-model-parallel-size",
    )
    yield (
        (args.expert_tensor_parallel_num_weight_shards or 1) > 1,
        "--expert-tensor-parallel-num-weight-shards",
        leave_out,
    )
    yield (
        args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
        "--tensor-model-parallel-size above 1 alone",
        "add --sequence-parallel",
    )
    yield args.add_bias_linear, "biases in the experts", f"add --disable-bias-linear, or {megatron}"
    yield args.activation_func_clamp_value is not None, "--activation-func-clamp-value", leave_out
    yield args.glu_linear_offset != 0, "--glu-linear-offset", leave_out
    yield args.moe_mlp_glu_interleave_size is not None, "--moe-mlp-glu-interleave-size", leave_out
    yield args.moe_expert_capacity_factor is not None, "--moe-expert-capacity-factor", f"it drops no token; {leave_out}"
    yield args.moe_expert_rank_capacity_factor is not None, "--moe-expert-rank-capacity-factor", leave_out
    yield args.moe_pad_expert_input_to_capacity, "--moe-pad-expert-input-to-capacity", f"it pads nothing; {leave_out}"
    yield (
        args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8,
        "--moe-router-padding-for-quantization",
        f"it pads nothing; {leave_out}",
    )
    yield (
        not args.bf16 and _compiled_grouped_gemm(),
        "fp32 or fp16 on the compiled grouped_gemm that is installed",
        "add --bf16, or uninstall grouped_gemm",
    )
    yield "moe_act" in (args.recompute_modules or []), "--recompute-modules moe_act", "use moe or leave it out"
    yield args.fp8 or args.fp4, "--fp8-format and --fp4-format", "use --bf16"
    yield args.moe_apply_probs_on_input, "--moe-apply-probs-on-input", leave_out
    yield args.moe_latent_size is not None, "--moe-latent-size", leave_out
    yield (
        "quantile_balancing" in ([balancing] if isinstance(balancing, str) else balancing),
        "--moe-router-load-balancing-type quantile_balancing",
        "use aux_loss, seq_aux_loss, global_aux_loss, sinkhorn or none",
    )
    yield (
        args.moe_token_dispatcher_type == "flex",
        "--moe-token-dispatcher-type flex",
        "it exchanges tokens itself; leave it out",
    )
    yield args.moe_shared_expert_overlap, "--moe-shared-expert-overlap", "it exchanges tokens itself; leave it out"
    yield args.overlap_moe_expert_parallel_comm, "--overlap-moe-expert-parallel-comm", leave_out
    yield args.overlap_dispatch_backward_with_experts_wgrad, "--overlap-dispatch-backward-with-experts-wgrad", leave_out
    yield args.delay_wgrad_compute, "--delay-wgrad-compute", leave_out
    yield args.moe_paged_stash, "--moe-paged-stash", leave_out
    yield args.fine_grained_activation_offloading, "--fine-grained-activation-offloading", leave_out
    yield args.mtp_num_layers, "--mtp-num-layers", leave_out
    yield args.moe_use_upcycling, "--moe-use-upcycling", f"up-cycle and save once with {megatron.removeprefix('use ')}"
    yield args.cuda_graph_impl != "none", "--cuda-graph-impl", "the host reads its experts' numbers of tokens; use none"
    yield args.use_megatron_fsdp, "--use-megatron-fsdp", "use --use-distributed-optimizer"
    yield args.use_torch_fsdp2, "--use-torch-fsdp2", "use --use-distributed-optimizer"
    yield args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized", "use local"
    yield args.init_model_with_meta_device, "--init-model-with-meta-device", "leave it out"
    yield getattr(args, "enable_mhc_connections", False), "--enable-mhc-connections", leave_out  # after 0.19
    yield args.hybrid_layer_pattern, "--hybrid-layer-pattern", megatron
    yield args.experimental_attention_variant, "--experimental-attention-variant", megatron
    yield args.heterogeneous_layers_config_path, "--heterogeneous-layers-config-path", megatron
    yield args.spec is not None, "--spec", f"it brings its own layer specification; {leave_out}"
    yield args.yaml_cfg is not None, "--yaml-cfg", "use --config or arguments"
