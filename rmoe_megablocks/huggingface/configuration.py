"""The configuration of an RMoE model: the library's usual names, and Megatron's spelling for the router."""

import sys
from functools import partial
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from rmoe_megablocks.routing import RESIDUAL, RouterType, RoutingConfig, all_arguments, get_router_type, owners

SCORE_FUNCTIONS = ("softmax", "sigmoid")
REDUCTIONS = ("sum", "mean")
ROUTER_DTYPES = (None, "float32", "float64")
# what a misspelt or unsupported option of the router begins with: the library keeps unknown keys without a word
_OURS = ("router_", "moe_", "num_null_", "num_expert", "n_group", "topk_group", "group_topk")


@strict
class RmoeConfig(PreTrainedConfig):
    """Sizes of the model, and how its layers route; the defaults are the paper's 0.91B model.

    Args:
        intermediate_size: of dense layers' MLPs.
        moe_intermediate_size: F, of one expert.
        moe_shared_expert_intermediate_size: of all shared experts together; None for none.
        moe_shared_expert_gate: whether a sigmoid of the hidden states weighs the shared expert.
        moe_shared_expert_scaling: what the shared expert's result is multiplied by; Megatron knows 1 alone.
        moe_layer_freq: 1 for a layer with experts, 0 for a dense one, one a layer; None for experts everywhere.
        attention_bias: biases of q, k and v (``--add-qkv-bias``); o has none.
        qk_norm: RMSNorm of each head's q and k, before RoPE (``--qk-layernorm``).
        router_type: a name from :func:`rmoe_megablocks.routing.router_types`, or ``module:Class``, whose module has
            been imported: a configuration file must not choose what is imported.
        router_options: the type's arguments by name, as ``{"moe_router_rnn_hidden_size": 256}``.
        router_dtype: of logits and state, as ``--moe-router-dtype``; None: that of the hidden states.
        router_score_function: ``softmax`` or ``sigmoid``.
        router_pre_softmax: whether the softmax is over all experts rather than over the chosen ones.
        router_topk_scaling_factor: weights are multiplied by it.
        router_enable_expert_bias: with sigmoid: a bias of each expert that decides on the choice alone. It is kept as
            it is: nothing here trains it.
        num_null_experts: M, as ``--moe-null-experts``.
        router_aux_loss_coef: weight of the load-balancing loss, where ``output_router_logits`` is set.
        router_aux_loss_reduction: whether that is of the layers' ``sum``, as Megatron's, or of their ``mean``.

    Raises:
        ValueError: one line, for what does not go together, an option that the router type does not take, and an
            unknown key that begins as the router's do.
    """

    model_type = "rmoe"
    default_theta = 10000.0
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 96512
    hidden_size: int = 1280
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 3456
    moe_intermediate_size: int = 448
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_shared_expert_scaling: float | int = 1.0
    moe_layer_freq: list[int] | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    qk_norm: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    router_type: str = "gru"
    router_options: dict[str, Any] | None = None
    router_dtype: str | None = None
    router_score_function: str = "softmax"
    router_pre_softmax: bool = False
    router_topk_scaling_factor: float | int | None = None
    router_enable_expert_bias: bool = False
    num_null_experts: int = 0
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_reduction: str = "sum"
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        self.router_options = dict(self.router_options or {})
        for name in kwargs:
            if name.startswith(_OURS):
                raise ValueError(f"{name} is no option of RmoeConfig: leave it out, or take a model without it")
        super().__post_init__(**kwargs)
        self.check()

    @property
    def router_logits(self) -> int:
        """Logits a token gets: E + M."""
        return self.num_experts + self.num_null_experts

    def routing(self) -> tuple[RouterType, RoutingConfig]:
        """The router type, and what it is built from. Raises ValueError, one line."""
        kind = _router_type(self.router_type)
        own = {argument.dest: argument for argument in kind.arguments}
        for name in self.router_options:
            if name not in own:
                belongs = [owner for found in all_arguments() if found.dest == name for owner in owners(found)]
                belongs = f" but of {', '.join(belongs)}" if belongs else ""
                raise ValueError(
                    f"router_options: {name} is no argument of router_type {kind.name!r}{belongs}: leave it out "
                    f"({kind.name} takes {', '.join(own)})"
                )
        config = RoutingConfig(
            hidden_size=self.hidden_size,
            num_experts=self.router_logits,
            options={own[name]: value for name, value in self.router_options.items()},
            num_layers=self.num_hidden_layers,
            init_method=partial(torch.nn.init.normal_, mean=0.0, std=self.initializer_range),
            moe_layers=frozenset(index for index in range(self.num_hidden_layers) if self.moe_layer_freq[index]),
        )
        kind.check(config)
        return kind, config

    def check(self) -> None:
        """Raises ValueError, one line. Not one of the library's validate_ methods, whose errors are no ValueErrors."""
        for name, allowed in (
            ("router_score_function", SCORE_FUNCTIONS),
            ("router_aux_loss_reduction", REDUCTIONS),
            ("router_dtype", ROUTER_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if len(self.moe_layer_freq) != self.num_hidden_layers or not {0, 1}.issuperset(self.moe_layer_freq):
            raise ValueError(
                f"moe_layer_freq must have a 0 or a 1 for each of the {self.num_hidden_layers} layers, "
                f"got {self.moe_layer_freq}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts ({self.num_experts}), "
                f"got {self.num_experts_per_tok}"
            )
        if self.num_null_experts < 0:
            raise ValueError(f"num_null_experts must be at least 0, got {self.num_null_experts}")
        for refused, why in self._contradictions():
            if refused:
                raise ValueError(why)
        self.routing()

    def _contradictions(self):
        """(whether it applies, the line that refuses it), as the Megatron host refuses them."""
        softmax = self.router_score_function == "softmax"
        yield (
            self.router_pre_softmax and not softmax,
            "router_pre_softmax needs router_score_function softmax: leave it out",
        )
        yield (
            self.router_enable_expert_bias and softmax,
            "router_enable_expert_bias needs router_score_function sigmoid: a softmax would not look at it",
        )
        yield (
            self.num_experts_per_tok == 1 and softmax and not self.router_pre_softmax,
            "num_experts_per_tok 1 needs router_pre_softmax: a softmax over one chosen expert is 1 whatever its logit",
        )
        yield (
            self.moe_shared_expert_gate and not self.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate needs moe_shared_expert_intermediate_size: there is no shared expert to weigh",
        )
        null = "num_null_experts does not work with"
        for name in ("router_pre_softmax", "router_enable_expert_bias"):
            yield self.num_null_experts and getattr(self, name), f"{null} {name}: leave it out"
        yield (
            self.num_null_experts and self.num_experts_per_tok == 1,
            f"{null} num_experts_per_tok 1: the one real expert's weight would be 1 whatever its logit; use 2 or more",
        )
        residual = self.router_options.get(RESIDUAL.dest)
        yield (
            residual and self.router_pre_softmax,
            f"{RESIDUAL.dest} does not work with router_pre_softmax: weights would be scores over the sum of all, "
            "which grows from layer to layer; leave it out",
        )
        yield (
            residual and not softmax,
            f"{RESIDUAL.dest} does not work with router_score_function {self.router_score_function}: it adds up scores "
            "of a softmax; use softmax",
        )


def _router_type(name: str) -> RouterType:
    module, colon, _ = name.partition(":")
    if colon and module not in sys.modules:
        raise ValueError(f"router_type {name!r} is code that was not loaded: import {module} before the model is made")
    try:
        return get_router_type(name)
    except ValueError as error:
        raise ValueError(f"router_type: {error}") from None
