"""What a run's arguments may say that the exported model cannot compute: refused by name, never left out."""

import argparse
from typing import Any

from rmoe_megablocks.errors import UsageError

# argument -> the values with which the model is the one that we write; a run of an older Megatron may lack any
_PLAIN: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0, 1),
    "softmax_type": ("vanilla",),
    "glu_linear_offset": (0.0, 0),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "mup_width_mult": (1.0, 1),
    "mup_embedding_mult": (1.0, 1),
    "mup_output_mult": (1.0, 1),
}
# arguments that must not be set
_UNSET = (
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "no_rope_freq",
    "mrope_section",
    "window_size",
    "window_attn_skip_freq",
    "multi_latent_attention",
    "experimental_attention_variant",
    "linear_attention_freq",
    "attention_output_gate",
    "qk_l2_norm",
    "qk_clip",
    "apply_layernorm_1p",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "activation_func_clamp_value",
    "squared_relu",
    "quick_geglu",
    "use_mup",
    "is_hybrid_model",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "enable_mhc_connections",
    "spec",
    "fp8",
    "fp4",
    "fp8_param_gather",
    "fp4_param_gather",
    "moe_latent_size",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "moe_apply_probs_on_input",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_expert_capacity_factor",
    "moe_expert_rank_capacity_factor",
    "moe_pad_expert_input_to_capacity",
)
#: of the balancing types these choose experts otherwise, at inference too
_CHOOSING = ("sinkhorn", "quantile_balancing")
# arguments whose option has another name
_OPTIONS = {"add_bias_linear": "--disable-bias-linear", "layernorm_zero_centered_gamma": "--apply-layernorm-1p"}


def check(args: argparse.Namespace) -> None:
    """Raises UsageError, one line that names every argument, for a model that the folder could not express."""
    found = [
        f"{_option(name)} {getattr(args, name)} (written is {' or '.join(map(str, allowed))})"
        for name, allowed in _PLAIN.items()
        if getattr(args, name, allowed[0]) not in allowed
    ]
    found += [f"{_option(name)} {getattr(args, name)}" for name in _UNSET if getattr(args, name, None)]
    kinds = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in _CHOOSING:
            found.append(f"--moe-router-load-balancing-type {kind}")
    if not getattr(args, "num_experts", None):
        found.append("no --num-experts")
    if found:
        raise UsageError(f"the exported model cannot express what this one was trained with: {', '.join(found)}")


def _option(name: str) -> str:
    return _OPTIONS.get(name, "--" + name.replace("_", "-"))
