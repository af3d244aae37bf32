"""The argument ``--moe-null-experts``, and what it is not combined with."""

import argparse
from collections.abc import Iterator
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing.parts.null_experts import SCORE_FUNCTIONS, expected_real_experts

OPTION = "--moe-null-experts"


def add_argument(group) -> None:
    """Adds ``--moe-null-experts`` to a group of arguments."""
    group.add_argument(
        OPTION,
        type=_read,
        default=0,
        metavar="M",
        help="Adds M logits of experts that do nothing (AdaMoE): of the --moe-router-topk best of all, a token uses "
        "those that are real, 0 to K, with weights normalised over them. Of all router types; 0, the default, is off.",
    )


def _read(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def of(config: object) -> int:
    """M of a TransformerConfig, 0 where it has none."""
    return getattr(config, "moe_null_experts", 0)


def logits(args: argparse.Namespace) -> int:
    """Logits a token gets: E + M."""
    return args.num_experts + args.moe_null_experts


def named(args: argparse.Namespace) -> str:
    """What the router chooses from, in words."""
    null_experts = f" and {args.moe_null_experts} null experts" if args.moe_null_experts else ""
    return f"{args.num_experts} experts{null_experts}"


def check(args: argparse.Namespace) -> None:
    """Refuses what was not shown to be right with null experts. Raises UsageError with one line."""
    if not args.moe_null_experts:
        return
    if not args.num_experts:
        raise UsageError(f"{OPTION} {args.moe_null_experts}: the model has no experts to route to; set --num-experts")
    for refused, option, instead in _refusals(args):
        if refused:
            raise UsageError(f"{OPTION} does not work with {option}: {instead}")


def notes(args: argparse.Namespace) -> list[str]:
    """A line about a figure that is an expectation, not a count."""
    if not (args.moe_null_experts and args.log_throughput):
        return []
    expected = expected_real_experts(args.moe_router_topk, args.num_experts, args.moe_null_experts)
    return [f"{OPTION}: --log-throughput counts {expected:.3g} real experts a token, those of balanced routing"]


# attributes of which none may be set
_LEFT_OUT = (
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_enable_expert_bias",
    "moe_router_fusion",
    "moe_enable_routing_replay",
    "moe_routing_trace_path",
    "moe_router_force_load_balancing",
    "moe_expert_capacity_factor",
    "moe_expert_rank_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
    "moe_router_padding_for_fp8",
    "moe_permute_fusion",
    "moe_apply_probs_on_input",
    "moe_shared_expert_overlap",
    "moe_latent_size",
    "moe_use_upcycling",
    "moe_paged_stash",
    "mtp_num_layers",
    "overlap_moe_expert_parallel_comm",
    "overlap_dispatch_backward_with_experts_wgrad",
    "delay_wgrad_compute",
    "fine_grained_activation_offloading",
    "save_tokens_per_expert_interval",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "experimental_attention_variant",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "init_model_with_meta_device",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "enable_mhc_connections",  # after 0.19
)


def _refusals(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    """(whether it applies, the option, what to do instead)."""
    kinds = args.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        yield (
            kind in ("sinkhorn", "quantile_balancing"),
            f"--moe-router-load-balancing-type {kind}",
            "it would balance null experts one by one; use aux_loss, seq_aux_loss, global_aux_loss or none",
        )
    yield (
        args.moe_router_score_function not in SCORE_FUNCTIONS,
        f"--moe-router-score-function {args.moe_router_score_function}",
        f"use {' or '.join(SCORE_FUNCTIONS)}",
    )
    yield (
        args.moe_router_pre_softmax,
        "--moe-router-pre-softmax",
        "weights are normalised over the chosen real experts; leave it out",
    )
    yield (
        args.moe_router_topk == 1,
        "--moe-router-topk 1",
        "the one real expert's weight would be 1 whatever its logit, and the model's loss would not train the router; "
        "use 2 or more",
    )
    yield args.moe_token_dispatcher_type == "flex", "--moe-token-dispatcher-type flex", "use alltoall or allgather"
    yield getattr(args, "moe_router_force_biased", None) is not None, "--moe-router-force-biased", "leave it out"
    yield (
        args.cuda_graph_impl != "none",
        "--cuda-graph-impl",
        "a token's number of experts varies, which the host reads; use none",
    )
    yield args.transformer_impl == "inference_optimized", "--transformer-impl inference_optimized", "use local"
    yield args.fp8 or args.fp4, "--fp8-format and --fp4-format", "use --bf16"
    yield args.spec is not None, "--spec", "its layers bring their own router"
    yield args.yaml_cfg is not None, "--yaml-cfg", "use --config or arguments"
    for name in _LEFT_OUT:
        yield getattr(args, name, None) not in (None, False, 0), "--" + name.replace("_", "-"), "leave it out"
