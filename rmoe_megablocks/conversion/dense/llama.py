"""A dense Llama-style folder, seen as the folder of a mixture of experts that is cut out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmoe_megablocks.conversion.dense import splitting
from rmoe_megablocks.conversion.dense.options import Options, check_divides
from rmoe_megablocks.conversion.folder.reading import Folder
from rmoe_megablocks.conversion.mapping.configuration import ARCHITECTURE, MODEL_TYPE, check_config, routing_config
from rmoe_megablocks.conversion.mapping.weights import entries
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import draw, get_router_type

#: model_type -> what its attention has beside Llama's: biases of q, k and v, norms of q and k
_KINDS = {"llama": {}, "mistral": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}
#: config.json -> the one value that the result can express, also where the key is missing
_ONLY: dict[str, Any] = {
    **{"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1},
    **{"attention_bias": False, "sliding_window": None},
}
_ROUTER, _SHARED = ".mlp.router.", "model.shared_router."
_BUFFERS = ".rotary_emb.inv_freq"  # of old folders: a constant


def config_of(dense: Mapping[str, Any], options: Options, folder: Folder) -> dict[str, Any]:
    """config.json of the mixture of experts.

    Raises:
        UsageError: one line that names what the model has that the result could not express.
    """
    kind = dense.get("model_type")
    if kind not in _KINDS:
        raise UsageError(
            f"--split-ffn takes dense models of model_type {', '.join(_KINDS)}; {folder.folder} is {kind!r}"
        )
    for key, only in _ONLY.items():
        value = dense.get(key, only)
        if key == "sliding_window" and not dense.get("use_sliding_window", kind == "mistral"):
            continue  # Qwen's files name a width that is not used
        if value != only:
            raise UsageError(f"{folder.folder}: {key} is {value!r}; the result could only have {only!r}")
    try:
        heads, hidden, width = (dense[key] for key in ("num_attention_heads", "hidden_size", "intermediate_size"))
        sizes = {key: dense[key] for key in ("vocab_size", "num_hidden_layers", "max_position_embeddings")}
        epsilon = float(dense["rms_norm_eps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder.folder}: config.json has no usable {str(error).strip(chr(39))}") from None
    check_divides(options, width, folder.folder)
    router = get_router_type(options.router_type)
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **sizes,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": dense.get("num_key_value_heads") or heads,
        "head_dim": dense.get("head_dim") or hidden // heads,
        "intermediate_size": width,
        "moe_intermediate_size": width // options.experts,
        "num_experts": options.experts,
        "num_experts_per_tok": options.topk,
        "moe_layer_freq": [1] * sizes["num_hidden_layers"],
        "initializer_range": dense.get("initializer_range", 0.02),
        "qk_norm": False,
        "attention_bias": False,
        **_KINDS[kind],
        "rms_norm_eps": epsilon,
        "rope_parameters": _rope(dense),
        "tie_word_embeddings": bool(dense.get("tie_word_embeddings", False)),
        "router_type": options.router_type,
        "router_options": {a.dest: options.router_options[a] for a in router.arguments if a.kept},
        "router_score_function": "softmax",
        "router_pre_softmax": False,
    }
    check_config(config)
    return config


def _rope(dense: Mapping[str, Any]) -> dict[str, Any]:
    """In the form of transformers 5, from it or from that of older releases. What it may say is checked later."""
    found = dict(dense.get("rope_parameters") or dense.get("rope_scaling") or {})
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    found.setdefault("rope_theta", dense.get("rope_theta", 10000.0))
    return found


class SplitFolder:
    """What :class:`.Folder` is to an import: weights by our names, made as they are asked for.

    Attributes:
        folder: where the dense model lies.
        config: of the mixture of experts.
        tensors: shape and dtype of every weight by name.
    """

    def __init__(self, dense: Folder, options: Options) -> None:
        """Raises UsageError with one line for a model that cannot be split, and for weights that are not Llama's."""
        self.folder, self._dense, self._options = dense.folder, dense, options
        self.config = config_of(dense.config, options, dense)
        self._routing = self._drawn_by()
        self._made: dict[int, Mapping[str, Tensor]] = {}
        self._neurons: tuple[int, Tensor] | None = None
        self.tensors = {
            name: (shape, self._dtype)
            for entry in entries(self.config)
            for name, shape in zip(entry.names, entry.shapes, strict=True)
        }
        self._check()

    @property
    def _dtype(self) -> torch.dtype:
        return self._dense.tensors.get("model.embed_tokens.weight", ((), torch.float32))[1]

    def _drawn_by(self):
        """The router's configuration, with how its weights are drawn."""
        found = routing_config(self.config)
        init = partial(torch.nn.init.normal_, mean=0.0, std=self.config["initializer_range"])
        values = {argument.dest: value for argument, value in self._options.router_options.items()}
        return dataclasses.replace(found, options=values, init_method=init)

    def _check(self) -> None:
        """Every weight of the dense model has its place: in sizes that config.json says, and none is left over."""
        width, hidden, there = self.config["intermediate_size"], self.config["hidden_size"], self._dense.tensors
        wanted = {n: shape for n, (shape, _) in self.tensors.items() if ".mlp." not in n and not n.startswith(_SHARED)}
        for layer in range(self.config["num_hidden_layers"]):
            for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                wanted[f"model.layers.{layer}.mlp.{part}_proj.weight"] = shape
        problems = [f"{name} is missing" for name in wanted if name not in there]
        for name, (shape, dtype) in there.items():
            if name not in wanted:
                if not name.endswith(_BUFFERS) and not self._is_tied_head(name):
                    problems.append(f"{name} has no place in a {self._dense.config['model_type']} model")
            elif tuple(shape) != tuple(wanted[name]):
                problems.append(f"{name} is {list(shape)}, config.json makes it {list(wanted[name])}")
            elif dtype != self._dtype:
                problems.append(f"{name} is of {dtype}, the embedding of {self._dtype}")
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UsageError(f"{self.folder}: {'; '.join(problems[:3])}{more}")

    def _is_tied_head(self, name: str) -> bool:
        tied = name == "lm_head.weight" and self.config["tie_word_embeddings"]
        return tied and torch.equal(self._dense.read(name), self._dense.read("model.embed_tokens.weight"))

    def read(self, name: str) -> Tensor:
        """A weight: the dense model's, a part of its feed-forward layers, or a drawn one."""
        if name in self._dense.tensors and ".mlp." not in name:
            return self._dense.read(name)
        if name.startswith(_SHARED):
            return self._drawn(-1)[name.removeprefix(_SHARED)].to(self._dtype)
        layer = int(name.split(".")[2])
        if _ROUTER in name:
            return self._drawn(layer)[name.split(_ROUTER)[1].removeprefix("layer.")].to(self._dtype)
        return self._experts(layer, name.rpartition(".")[2])

    def padding(self) -> dict[str, Tensor]:
        """None: a folder of Hugging Face's has no rows of Megatron's."""
        return {}

    def _experts(self, layer: int, part: str) -> Tensor:
        """[E, 2F/E, H] gates above ups, or [E, H, F/E] times the scale."""
        place = f"model.layers.{layer}.mlp."
        gate_FH = self._dense.read(f"{place}gate_proj.weight")
        if self._neurons is None or self._neurons[0] != layer:
            o = self._options
            self._neurons = (layer, splitting.split(gate_FH, o.experts, o.method, o.seed + layer))
        of_expert = self._neurons[1]
        if part == "gate_up_proj":
            up_FH = self._dense.read(f"{place}up_proj.weight")
            return torch.cat((gate_FH[of_expert], up_FH[of_expert]), dim=1)
        down_HF = self._dense.read(f"{place}down_proj.weight")
        return (down_HF.T[of_expert].transpose(1, 2).float() * self._options.scale).to(down_HF.dtype).contiguous()

    def _drawn(self, layer: int) -> Mapping[str, Tensor]:
        """The weights of a layer's router; of -1 what all layers share. One seed gives one model."""
        if layer not in self._made:
            self._made.clear()
            kind = get_router_type(self._options.router_type)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._options.seed * 1_000_003 + layer + 1)
                if layer < 0:
                    found = kind.build_shared(self._routing).state_dict()
                elif kind.replaces_hosts:
                    found = kind.build_layer(self._routing).state_dict()
                else:
                    found = {"weight": torch.empty(self._routing.num_experts, self._routing.hidden_size)}
                    draw(self._routing, found["weight"])
            self._made[layer] = found
        return self._made[layer]
