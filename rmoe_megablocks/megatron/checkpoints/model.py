"""Whether a checkpoint is of this run's model: compared by the arguments it was saved with, before anything is built.

Megatron finds out late, in two levels of exceptions, or not at all: an output layer that the run does not have is
dropped without a word.
"""

import argparse
from collections.abc import Callable
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import compatibility

# what shapes a tensor, or decides whether there is one
_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "max_position_embeddings",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "attention_output_gate",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mtp_num_layers",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_enable_expert_bias",
    "moe_latent_size",
)
# what changes the function that the same tensors compute
_MEANINGS = (
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "rope_scaling_factor",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "norm_epsilon",
    "apply_layernorm_1p",
    "apply_residual_connection_post_layernorm",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "softmax_type",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
)
# arguments whose option says the opposite of, or something else than, their name
_OPTIONS = {"add_bias_linear": "--disable-bias-linear", "apply_layernorm_1p": "--apply-layernorm-1p"}
_UNSET = object()


def check(args: argparse.Namespace) -> list[str]:
    """Compares the model of the checkpoint that the run starts from, if there is one, with the run's own.

    Args:
        args: validated; ``load`` and ``ckpt_step`` or ``pretrained_checkpoint`` as they will be loaded.

    Returns:
        a line if the same weights will compute something else than they were trained for.

    Raises:
        UsageError: weights that would not fit, or be left out; names each argument with both values.
    """
    start = compatibility.starts_from(args)
    saved = start and compatibility.saved_arguments(start.folder, args.ckpt_step)
    if not saved or args.moe_use_upcycling:  # from a dense model, on purpose
        return []
    different = _differences(saved, args, _SHAPES)
    if different:
        raise UsageError(
            f"{start.option} {start.folder}: the checkpoint is of another model: it has {_listed(different, 1)}, this "
            f"run {_listed(different, 2)}; use the checkpoint's, or another --run-name or --save for a new model"
        )
    changed = _differences(saved, args, _MEANINGS)
    if not changed:
        return []
    return [f"the checkpoint was trained with {_listed(changed, 1)}, and goes on with {_listed(changed, 2)}"]


def _differences(saved: argparse.Namespace, args: argparse.Namespace, names: tuple[str, ...]) -> list[tuple]:
    """(option, saved value, the run's) of those that differ; an older Megatron saved fewer."""
    found = []
    for name in names:
        theirs, ours = _value(saved, name), _value(args, name)
        if _UNSET not in (theirs, ours) and theirs != ours:
            option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
            if name == "add_bias_linear":
                theirs, ours = not theirs, not ours
            found.append((option, theirs, ours))
    return found


def _listed(differences: list[tuple], place: int) -> str:
    return ", ".join(_spelled(difference[0], difference[place]) for difference in differences)


def _spelled(option: str, value: Any) -> str:
    if value in (None, False):
        return f"no {option}"
    return option if value is True else f"{option} {value}"


def _value(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name, _UNSET)
    return _MEANT[name](args, value) if name in _MEANT and value is not _UNSET else value


def _layers_with_experts(args: argparse.Namespace, frequency: int | list[int]) -> list[int] | None:
    """1 for a layer with experts, 0 for a dense one; None where all layers are alike."""
    if not args.num_experts or frequency == 1:
        return None
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


#: what an argument's value comes to, where it stands for a default or has no effect
_MEANT: dict[str, Callable[[argparse.Namespace, Any], Any]] = {
    "num_query_groups": lambda args, n: n if args.group_query_attention else args.num_attention_heads,
    "kv_channels": lambda args, n: None if n == args.hidden_size // args.num_attention_heads else n,
    "vocab_size": lambda args, n: n or _UNSET,
    "max_position_embeddings": lambda args, n: n if args.position_embedding_type == "learned_absolute" else None,
    "ffn_hidden_size": lambda args, n: n if _has_dense_layers(args) else None,
    "moe_ffn_hidden_size": lambda args, n: (n or args.ffn_hidden_size) if args.num_experts else None,
    "moe_layer_freq": _layers_with_experts,
    "moe_router_topk": lambda args, n: n if args.num_experts else None,
    "moe_router_score_function": lambda args, n: n if args.num_experts else None,
    "rotary_base": lambda args, n: n if args.position_embedding_type == "rope" else None,
    "rotary_percent": lambda args, n: n if args.position_embedding_type == "rope" else None,
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        lambda args, n: n if args.multi_latent_attention else None,
    ),
    "mtp_num_layers": lambda args, n: n or None,
    "window_size": lambda args, n: tuple(n) if n else None,
}


def _has_dense_layers(args: argparse.Namespace) -> bool:
    return not args.num_experts or not all(_layers_with_experts(args, args.moe_layer_freq) or [1])
