"""The key map: which tensors of the written model are which part of which tensor of a Megatron checkpoint.

:func:`entries` is the whole of it, read both ways. Megatron writes the layers of a model whose layers are alike as one
tensor with the layers in front (``decoder.layers.X`` [L, ...]), those of one with dense layers one by one
(``decoder.layers.3.X``); experts of both backends are [E, ...] behind that.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmoe_megablocks.conversion.mapping.configuration import routing_config
from rmoe_megablocks.routing import get_router_type

Shape = tuple[int, ...]
LAYERS = "decoder.layers."
#: alternative spellings: with Transformer Engine the norm before experts has a name of its own
NORM_BEFORE_EXPERTS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@dataclass(frozen=True)
class Entry:
    """One tensor of Megatron, of one layer where it belongs to one, and the tensors that are written of it.

    Attributes:
        keys: its name behind ``decoder.layers.N.``, or the whole one without a layer; others that it may have.
        layer: None for what belongs to no layer.
        shape: of this layer's part, without padding.
        names, shapes: of the tensors that are written.
        split: the part of the layer -> these tensors.
        join: the inverse.
        linears: experts, for what Megatron stores an empty entry beside (``_extra_state``): 0 none, else one each.
        rows: whether axis 0 is the vocabulary, which Megatron pads.
        dtype: where it has another one than the model's.
    """

    keys: tuple[str, ...]
    layer: int | None
    shape: Shape
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda whole: (whole,)
    join: Callable[[tuple[Tensor, ...]], Tensor] = lambda parts: parts[0]
    linears: int = 0
    rows: bool = False
    dtype: torch.dtype | None = None


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """Every tensor of the model that a checked config.json describes, in the order of its layers."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    found = [_plain("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocabulary, hidden), rows=True)]
    found += _shared_routing(config)
    for layer in range(config["num_hidden_layers"]):
        found += _layer(config, layer)
    found.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        found.append(_plain("output_layer.weight", "lm_head.weight", (vocabulary, hidden), rows=True))
    return found


def _plain(key: str | tuple[str, ...], name: str, shape: Shape, layer: int | None = None, **more: Any) -> Entry:
    return Entry((key,) if isinstance(key, str) else key, layer, tuple(shape), (name,), (tuple(shape),), **more)


def _layer(config: Mapping[str, Any], layer: int) -> Iterator[Entry]:
    hidden = config["hidden_size"]
    name = f"model.layers.{layer}."
    yield _plain("self_attention.linear_qkv.layer_norm_weight", f"{name}input_layernorm.weight", (hidden,), layer)
    yield from _attention(config, layer, f"{name}self_attn.")
    experts = bool(config["moe_layer_freq"][layer])
    norm = NORM_BEFORE_EXPERTS if experts else NORM_BEFORE_EXPERTS[:1]
    yield _plain(norm, f"{name}post_attention_layernorm.weight", (hidden,), layer)
    if not experts:
        yield from _gated("mlp.", f"{name}mlp.", hidden, config["intermediate_size"], layer)
        return
    yield from _router(config, layer, f"{name}mlp.router.")
    yield from _experts(config, layer, f"{name}mlp.")
    width = config.get("moe_shared_expert_intermediate_size")
    if width:
        yield from _gated("mlp.shared_experts.", f"{name}mlp.shared_experts.", hidden, width, layer)
        if config.get("moe_shared_expert_gate"):
            yield _plain("mlp.shared_experts.gate_weight", f"{name}mlp.shared_experts_gate.weight", (1, hidden), layer)


def _attention(config: Mapping[str, Any], layer: int, name: str) -> Iterator[Entry]:
    """Queries, keys and values lie group by group: q/G query heads, a key head, a value head."""
    hidden, heads, groups, size = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    cut = {"split": partial(_split_qkv, groups, size), "join": partial(_join_qkv, groups)}
    names = tuple(f"{name}{letter}_proj." for letter in "qkv")
    rows = (heads * size, groups * size, groups * size)
    key = "self_attention.linear_qkv."
    yield Entry(
        (f"{key}weight",), layer, (sum(rows), hidden), tuple(f"{n}weight" for n in names),
        tuple((n, hidden) for n in rows), linears=1, **cut,
    )  # fmt: skip
    if config.get("attention_bias"):
        yield Entry(
            (f"{key}bias",), layer, (sum(rows),), tuple(f"{n}bias" for n in names), tuple((n,) for n in rows), **cut
        )
    yield _plain("self_attention.linear_proj.weight", f"{name}o_proj.weight", (hidden, rows[0]), layer, linears=1)
    if config.get("qk_norm"):
        for letter in "qk":
            yield _plain(f"self_attention.{letter}_layernorm.weight", f"{name}{letter}_norm.weight", (size,), layer)


def _gated(key: str, name: str, hidden: int, width: int, layer: int) -> Iterator[Entry]:
    """A gated unit: gate above up in one matrix."""
    names = tuple(f"{name}{part}_proj.weight" for part in ("gate", "up"))
    yield Entry(
        (f"{key}linear_fc1.weight",), layer, (2 * width, hidden), names, ((width, hidden),) * 2,
        split=lambda whole: tuple(whole.chunk(2)), join=torch.cat, linears=1,
    )  # fmt: skip
    yield _plain(f"{key}linear_fc2.weight", f"{name}down_proj.weight", (hidden, width), layer, linears=1)


def _experts(config: Mapping[str, Any], layer: int, name: str) -> Iterator[Entry]:
    experts, hidden, width = (config[key] for key in ("num_experts", "hidden_size", "moe_intermediate_size"))
    for linear, part, shape in (
        ("linear_fc1", "gate_up_proj", (experts, 2 * width, hidden)),
        ("linear_fc2", "down_proj", (experts, hidden, width)),
    ):
        yield _plain(f"mlp.experts.experts.{linear}.weight", f"{name}experts.{part}", shape, layer, linears=experts)


def _router(config: Mapping[str, Any], layer: int, name: str) -> Iterator[Entry]:
    kind, routing = get_router_type(config["router_type"]), routing_config(config)
    if kind.replaces_hosts:
        with torch.device("meta"):
            owned = kind.layer(routing).state_dict()
        for part, tensor in owned.items():
            yield _plain(f"mlp.router.routing_layer.{part}", f"{name}layer.{part}", tensor.shape, layer)
    else:
        yield _plain("mlp.router.weight", f"{name}weight", (routing.num_experts, routing.hidden_size), layer)
    if config.get("router_enable_expert_bias"):
        experts = (config["num_experts"],)
        yield _plain("mlp.router.expert_bias", f"{name}expert_bias", experts, layer, dtype=torch.float32)


def _shared_routing(config: Mapping[str, Any]) -> Iterator[Entry]:
    with torch.device("meta"):
        shared = get_router_type(config["router_type"]).build_shared(routing_config(config))
    for part, tensor in () if shared is None else shared.state_dict().items():
        yield _plain(f"rnn_router.cell.{part}", f"model.shared_router.{part}", tensor.shape)


def _split_qkv(groups: int, size: int, whole: Tensor) -> tuple[Tensor, ...]:
    """[G (q/G + 2) hd, ...] -> queries [q hd, ...], keys and values [G hd, ...]."""
    rows = whole.view(groups, -1, *whole.shape[1:])
    sizes = (rows.shape[1] - 2 * size, size, size)
    return tuple(part.flatten(0, 1) for part in rows.split(sizes, dim=1))


def _join_qkv(groups: int, parts: tuple[Tensor, ...]) -> Tensor:
    """The inverse of :func:`_split_qkv`."""
    return torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)
