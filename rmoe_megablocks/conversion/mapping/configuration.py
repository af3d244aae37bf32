"""config.json of a run's arguments, and the arguments of a config.json: one table, read both ways."""

import argparse
from collections.abc import Mapping
from typing import Any

from rmoe_megablocks.conversion.mapping import refusals
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import Argument, RoutingConfig, get_router_type

MODEL_TYPE, ARCHITECTURE = "rmoe", "RmoeForCausalLM"
_DEFAULT_EPSILON = 1e-5  # Megatron's where --norm-epsilon is not given, which a checkpoint then says nothing of

# config.json -> Megatron's argument, and its value where a checkpoint of an older release lacks it
_SAME: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", None),
    "num_hidden_layers": ("num_layers", None),
    "num_attention_heads": ("num_attention_heads", None),
    "intermediate_size": ("ffn_hidden_size", None),
    "max_position_embeddings": ("max_position_embeddings", None),
    "initializer_range": ("init_method_std", 0.02),
    "qk_norm": ("qk_layernorm", False),
    "attention_bias": ("add_qkv_bias", False),
    "num_experts": ("num_experts", None),
    "num_experts_per_tok": ("moe_router_topk", None),
    "moe_shared_expert_gate": ("moe_shared_expert_gate", False),
    "router_type": ("moe_router_type", "linear"),
    "router_score_function": ("moe_router_score_function", "softmax"),
    "router_pre_softmax": ("moe_router_pre_softmax", False),
    "router_topk_scaling_factor": ("moe_router_topk_scaling_factor", None),
    "router_enable_expert_bias": ("moe_router_enable_expert_bias", False),
    "num_null_experts": ("moe_null_experts", 0),
    "router_aux_loss_reduction": ("moe_aux_loss_reduction", "sum"),
}
_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}
_WHOLE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "max_position_embeddings"),
)


def config_of(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """What config.json says of a model that was trained with ``args``.

    Args:
        args: as Megatron saved them, validated.
        vocab_size: without the rows that Megatron pads.

    Raises:
        UsageError: one line that names what the model written cannot express, or what the arguments lack.
    """
    refusals.check(args)
    config: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    for key, (name, default) in _SAME.items():
        config[key] = getattr(args, name, default)
    grouped = getattr(args, "group_query_attention", False)
    shared = getattr(args, "moe_shared_expert_intermediate_size", None) or None
    config |= {
        "vocab_size": vocab_size,
        "num_key_value_heads": args.num_query_groups if grouped else args.num_attention_heads,
        "head_dim": args.kv_channels or args.hidden_size // args.num_attention_heads,
        "moe_intermediate_size": getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shared,
        "moe_layer_freq": _layers_with_experts(args),
        "rms_norm_eps": _epsilon(args),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(getattr(args, "rotary_base", 10000))},
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "router_options": {
            argument.dest: _option(args, argument) for argument in kept_arguments(config["router_type"])
        },
        "router_dtype": _DTYPES[getattr(args, "moe_router_dtype", None)],
        "router_aux_loss_coef": _coefficient(args),
    }
    return config


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, by name, of the model that a config.json describes.

    Raises:
        UsageError: one line that names the key that is missing, of the wrong kind, or that Megatron cannot express.
    """
    check_config(config)
    found = {name: config.get(key, default) for key, (name, default) in _SAME.items()}
    layers = list(config["moe_layer_freq"])
    dtypes = {value: name for name, value in _DTYPES.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    return found | {
        **{
            argument.dest: config["router_options"].get(argument.dest, argument.default)
            for argument in kept_arguments(config["router_type"])
        },
        "kv_channels": config["head_dim"],
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config.get("moe_shared_expert_intermediate_size") or None,
        "moe_layer_freq": 1 if all(layers) else layers,
        "layernorm_epsilon": config["rms_norm_eps"],
        "rotary_base": _whole_if_it_is(config["rope_parameters"]["rope_theta"]),
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "moe_router_dtype": dtypes[config.get("router_dtype")],
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.0),
        "moe_router_load_balancing_type": "aux_loss" if config.get("router_aux_loss_coef") else "none",
        "vocab_size": config["vocab_size"],
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
    }


def routing_config(config: Mapping[str, Any]) -> RoutingConfig:
    """What a router of this model is built with. Raises UsageError for options that do not go together."""
    names = {argument.dest: argument for argument in get_router_type(config["router_type"]).arguments}
    unknown = sorted(set(config["router_options"]) - set(names))
    if unknown:
        raise UsageError(f"router_options: the router type {config['router_type']} has no {unknown[0]}")
    try:
        found = RoutingConfig(
            hidden_size=config["hidden_size"],
            num_experts=config["num_experts"] + (config.get("num_null_experts") or 0),
            num_layers=config["num_hidden_layers"],
            options={names[name]: value for name, value in config["router_options"].items()},
            moe_layers=frozenset(index for index, experts in enumerate(config["moe_layer_freq"]) if experts),
        )
        get_router_type(config["router_type"]).check(found)
    except ValueError as error:
        raise UsageError(f"router_options: {error}") from error
    return found


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UsageError for a config.json of another model, or one that cannot be right."""
    if config.get("model_type") != MODEL_TYPE:
        raise UsageError(f"config.json: model_type is {config.get('model_type')!r}, expected {MODEL_TYPE!r}")
    for key in _WHOLE:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"config.json: {key} must be a whole number of at least 1, got {value!r}")
    for key, kind in (("moe_layer_freq", list), ("router_options", dict), ("rope_parameters", dict)):
        if not isinstance(config.get(key), kind):
            raise UsageError(f"config.json: {key} must be a {kind.__name__}, got {config.get(key)!r}")
    layers = config["moe_layer_freq"]
    if len(layers) != config["num_hidden_layers"] or not set(layers) <= {0, 1}:
        raise UsageError(
            f"config.json: moe_layer_freq must be {config['num_hidden_layers']} times 0 or 1, got {layers}"
        )
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default" or not isinstance(rope.get("rope_theta"), int | float):
        raise UsageError(f"config.json: rope_parameters must be of rope_type default with a rope_theta, got {rope}")
    for key, value, plain in (
        ("hidden_act", config.get("hidden_act"), (None, "silu")),
        ("moe_shared_expert_scaling", config.get("moe_shared_expert_scaling"), (None, 1, 1.0)),
        ("rope_parameters' partial_rotary_factor", rope.get("partial_rotary_factor"), (None, 1, 1.0)),
    ):
        if value not in plain:
            raise UsageError(f"config.json: {key} {value!r} is not among what a checkpoint can say, only {plain[-1]!r}")
    if not isinstance(config.get("rms_norm_eps"), float) or not isinstance(config.get("tie_word_embeddings"), bool):
        raise UsageError("config.json: rms_norm_eps must be a number and tie_word_embeddings true or false")
    if config.get("router_dtype") not in _DTYPES.values():
        raise UsageError(f"config.json: router_dtype {config['router_dtype']!r}: expected null, float32 or float64")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise UsageError("config.json: num_attention_heads is not a multiple of num_key_value_heads")
    try:
        get_router_type(config.get("router_type", "linear"))
    except (ValueError, TypeError) as error:
        raise UsageError(f"config.json: router_type: {error}") from error


def kept_arguments(router_type: str) -> list[Argument]:
    """Those of a router type that a checkpoint belongs to, as against how it was drawn or is computed."""
    return [argument for argument in get_router_type(router_type).arguments if argument.kept]


def _option(args: argparse.Namespace, argument: Argument) -> Any:
    return getattr(args, argument.dest, argument.default)


def _layers_with_experts(args: argparse.Namespace) -> list[int]:
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return list(frequency)


def _epsilon(args: argparse.Namespace) -> float:
    for name in ("norm_epsilon", "layernorm_epsilon"):
        if getattr(args, name, None) is not None:
            return getattr(args, name)
    return _DEFAULT_EPSILON


def _coefficient(args: argparse.Namespace) -> float:
    """Of Megatron's aux_loss, a layer's; the other balancing losses are not the model's here."""
    kinds = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    factors = getattr(args, "moe_aux_loss_coeff", 0.0)
    pairs = [(kinds, factors)] if isinstance(kinds, str) else zip(kinds, factors, strict=True)
    return float(sum(factor for kind, factor in pairs if kind == "aux_loss"))


def _whole_if_it_is(value: float) -> int | float:
    """Megatron's --rotary-base is a whole number."""
    return int(value) if float(value).is_integer() else value
