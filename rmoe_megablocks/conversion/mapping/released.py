"""The layout of the paper's released model, ``llama_moe_rnn``: another spelling of config.json and of the weights.

One matrix an expert and part, one a gate of the cell (``huggingface/folders/released.py`` loads it). Both directions:
``rmoe export --layout llama_moe_rnn`` writes it, ``rmoe import`` takes it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rmoe_megablocks.conversion.mapping.configuration import ARCHITECTURE, MODEL_TYPE, kept_arguments
from rmoe_megablocks.conversion.mapping.weights import Entry
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import LINEAR, STATE_SIZE

LAYOUT, _ARCHITECTURE = "llama_moe_rnn", "LlamaMoeRnnForCausalLM"
#: gates of a cell, in the order of our stacked matrices; its other types have a matrix a layer, here called topk
_GATES = {"gru": "rzn", "rnn": "n"}
_TOPK = "topk"
_SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
    *("num_experts_per_tok", "router_aux_loss_coef"),
)
#: what the layout has no word for, and the value that it stands for
_ONLY = {
    **{"num_null_experts": 0, "router_score_function": "softmax", "router_pre_softmax": False},
    **{"router_topk_scaling_factor": None, "router_enable_expert_bias": False, "moe_shared_expert_gate": False},
    **{"qk_norm": False, "attention_bias": False},
}


def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released model's config.json for a config.json of ours.

    Raises:
        UsageError: one line that names what the layout cannot express.
    """
    refused = next(_refused(config), None)
    if refused:
        raise UsageError(f"--layout {LAYOUT} has no {refused}: leave --layout out")
    kind, shared = config["router_type"], config.get("moe_shared_expert_intermediate_size")
    found = {"model_type": LAYOUT, "architectures": [_ARCHITECTURE], **{key: config[key] for key in _SAME}}
    found |= {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "hidden_act": "silu",
        "attention_bias": False,
        "num_local_experts": config["num_experts"],
        "moe_num_layers": sum(config["moe_layer_freq"]),
        "moe_expert_intermediate_size": config["moe_intermediate_size"],
        "moe_router_type": kind if kind in _GATES else _TOPK,
        "add_moe_bias": False,
        "add_moe_share_expert": bool(shared),
    }
    if kind in _GATES:
        found["moe_router_rnn_hidden_size"] = _state_size(config)
    if shared:  # Megatron adds both as they are
        found |= {"moe_share_expert_intermediate_size": shared, "moe_weight": 1.0, "share_weight": 1.0}
    return found


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    kind, layers = config["router_type"], config["moe_layer_freq"]
    if kind not in _GATES and kind != LINEAR:
        yield f"router of type {kind}, only {', '.join(_GATES)} and {LINEAR}"
    for argument in kept_arguments(kind):
        value = config["router_options"].get(argument.dest, argument.default)
        if argument is not STATE_SIZE and value != argument.default:
            yield f"{argument.option} {value}"
    for key, only in _ONLY.items():
        if config.get(key, only) not in (only, None, 0, False) and config.get(key) != only:
            yield f"{key} {config[key]!r}"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield f"head_dim {config['head_dim']} beside {config['num_attention_heads']} heads"
    if sorted(layers) != list(layers):
        yield "dense layers behind layers with experts"


def ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our config.json for the released model's.

    Raises:
        UsageError: one line that names the key that is missing or that a checkpoint cannot express.
    """
    for key in ("add_moe_bias", "attention_bias"):
        if config.get(key):
            raise UsageError(f"config.json: {key} of a {LAYOUT} model: where its biases lie was not published")
    whole = ["num_hidden_layers", "moe_num_layers", "num_local_experts", "moe_expert_intermediate_size"]
    whole += ["moe_router_rnn_hidden_size"] * (config.get("moe_router_type") in _GATES)
    for key in whole:
        if not isinstance(config.get(key), int):
            raise UsageError(f"config.json: {key} of a {LAYOUT} model must be a whole number, got {config.get(key)!r}")
    try:
        layers, experts = config["num_hidden_layers"], config["moe_num_layers"]
        kind = config["moe_router_type"] if config["moe_router_type"] in _GATES else LINEAR
        found = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
        found |= {key: config[key] for key in _SAME if key not in ("router_aux_loss_coef", "initializer_range")}
        found |= {
            "initializer_range": config.get("initializer_range", 0.02),
            "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.0),
            "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
            "head_dim": config["hidden_size"] // max(1, config["num_attention_heads"]),
            "num_experts": config["num_local_experts"],
            "moe_intermediate_size": config["moe_expert_intermediate_size"],
            "moe_layer_freq": [0] * (layers - experts) + [1] * experts,
            "router_type": kind,
            "router_options": {a.dest: a.default for a in kept_arguments(kind)},
        }
        if kind in _GATES:
            found["router_options"][STATE_SIZE.dest] = config["moe_router_rnn_hidden_size"]
        if config.get("add_moe_share_expert"):
            found["moe_shared_expert_intermediate_size"] = config["moe_share_expert_intermediate_size"]
            found["moe_shared_expert_scaling"] = config.get("share_weight", 0.5)
            weight = config.get("moe_weight", 0.5)
            found["router_topk_scaling_factor"] = None if weight == 1 else weight
    except KeyError as error:
        raise UsageError(f"config.json: {error.args[0]} is missing, which a {LAYOUT} model has") from None
    if config.get("rope_scaling"):
        raise UsageError(f"config.json: rope_scaling {config['rope_scaling']!r} cannot be said of a checkpoint")
    return found


def entry(of: Entry, config: Mapping[str, Any]) -> Entry:
    """An entry of :func:`.weights.entries` with the released names and parts."""
    (name, *others), experts, width = of.names, config["num_experts"], config["moe_intermediate_size"]
    if name.endswith(".mlp.experts.gate_up_proj"):
        place = name.replace(".mlp.experts.gate_up_proj", ".block_sparse_moe.experts.")
        names = [f"{place}{expert}.{part}.weight" for expert in range(experts) for part in ("w1", "w3")]
        return _parts(of, names, (width, of.shape[2]), lambda whole: whole.flatten(0, 1).split(width))
    if name.endswith(".mlp.experts.down_proj"):
        place = name.replace(".mlp.experts.down_proj", ".block_sparse_moe.experts.")
        names = [f"{place}{expert}.w2.weight" for expert in range(experts)]
        return _parts(of, names, of.shape[1:], lambda whole: whole.unbind(0))
    if name.startswith("model.shared_router."):
        gates, size = _GATES[config["router_type"]], _state_size(config)
        stem = name.replace("model.shared_router.", "model.rnn_router.").removesuffix("h")
        return _parts(of, [stem + gate for gate in gates], (size, *of.shape[1:]), lambda whole: whole.split(size))
    return replace(of, names=tuple(_renamed(n) for n in (name, *others)))


def _parts(of: Entry, names: list[str], shape: tuple[int, ...], split: Callable[[Tensor], tuple[Tensor, ...]]) -> Entry:
    join = lambda parts: torch.cat([part.reshape(-1, *of.shape[2:]) for part in parts]).view(of.shape)  # noqa: E731
    if len(of.shape) < 3:
        join = torch.cat
    return replace(of, names=tuple(names), shapes=(tuple(shape),) * len(names), split=split, join=join)


def _renamed(name: str) -> str:
    for before, after in (
        (".mlp.router.layer.projector", ".block_sparse_moe.weight1"),
        (".mlp.router.layer.router", ".block_sparse_moe.weight2"),
        (".mlp.router.weight", ".block_sparse_moe.gate.weight"),
        (".mlp.shared_experts.", ".mlp_share."),
    ):
        name = name.replace(before, after)
    return name


def _state_size(config: Mapping[str, Any]) -> int:
    return config["router_options"].get(STATE_SIZE.dest, STATE_SIZE.default)
