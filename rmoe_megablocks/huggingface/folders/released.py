"""Folders in the layout of the paper's released Llama-style model (``llama_moe_rnn``), read and written as they are.

The released code cannot be run as published; this is its arithmetic, by the names of its weights. What differs: its
auxiliary loss takes the tokens of all layers for those of one, ours is Megatron's.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from rmoe_megablocks.routing import LINEAR, STATE_SIZE

from ..configuration import RmoeConfig
from ..modeling import RmoeForCausalLM

_NAMES = {"num_local_experts": "num_experts", "moe_expert_intermediate_size": "moe_intermediate_size"}
_REFUSED = {
    "add_moe_bias": "the layout of the biases was not published",
    "attention_bias": "its output projection would have a bias, which RmoeConfig has not",
}
#: types that the layout has weights for; its code takes every other word for a matrix a layer
_RECURRENT = ("gru", "rnn")


@strict
class LlamaMoeRnnConfig(RmoeConfig):
    """A configuration with the released model's keys, or with RmoeConfig's, which is how it is saved.

    Raises:
        ValueError: biases (add_moe_bias, attention_bias).
    """

    model_type = "llama_moe_rnn"
    rms_norm_eps: float = 1e-6  # Llama's, where a file does not say it

    def __post_init__(self, **kwargs):
        for name, why in _REFUSED.items():
            if kwargs.pop(name, getattr(self, name, False)):
                raise ValueError(f"{name}=True of a {self.model_type} model cannot be loaded: {why}")
        for theirs, ours in _NAMES.items():
            if theirs in kwargs:
                setattr(self, ours, kwargs.pop(theirs))
        if "moe_router_type" in kwargs:
            word = kwargs.pop("moe_router_type")
            self.router_type = word if word in _RECURRENT else LINEAR
        size = kwargs.pop(STATE_SIZE.dest, None)
        if size is not None and self.router_type != LINEAR:
            self.router_options = {**(self.router_options or {}), STATE_SIZE.dest: size}
        if "moe_num_layers" in kwargs:
            experts = kwargs.pop("moe_num_layers")
            self.moe_layer_freq = [0] * (self.num_hidden_layers - experts) + [1] * experts
        self._take_shared_expert(kwargs)
        super().__post_init__(**kwargs)

    def _take_shared_expert(self, kwargs: dict[str, Any]) -> None:
        """The result is moe_weight times the experts' and share_weight times the shared expert's."""
        there = kwargs.pop("add_moe_share_expert", False)
        width, experts, shared = (
            kwargs.pop(name, default)
            for name, default in (("moe_share_expert_intermediate_size", None), ("moe_weight", 0.5),
                                  ("share_weight", 0.5))
        )  # fmt: skip
        if there:
            self.moe_shared_expert_intermediate_size = width
            self.router_topk_scaling_factor, self.moe_shared_expert_scaling = experts, shared


class LlamaMoeRnnForCausalLM(RmoeForCausalLM):
    """:class:`.RmoeForCausalLM` whose folders have the released layout."""

    config_class = LlamaMoeRnnConfig
    config: LlamaMoeRnnConfig


class _StackGates(Concatenate):
    """The gates r, z and n, or n alone, one below the other."""

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitGates()


class _SplitGates(ConversionOps):
    def convert(
        self, input_dict, source_patterns, target_patterns, config=None, full_layer_name: str = "", **kwargs
    ) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        gates = tensor.split(config.routing()[1][STATE_SIZE])
        names = target_patterns[-len(gates) :]
        if target_patterns[0] not in names:  # by which the library would find what stands before it
            before = full_layer_name.partition(target_patterns[0])[0]
            names = [before + name for name in names]
        return {name: gate.contiguous() for name, gate in zip(names, gates, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _StackGates(dim=0)


def _gates(theirs: str, ours: str) -> WeightConverter:
    sources = [f"rnn_router.{theirs}{gate}" for gate in "rzn"]
    return WeightConverter(sources, f"shared_router.{ours}", [_StackGates(dim=0)])


_EXPERTS = ".block_sparse_moe.experts.*"
MAPPING = [
    WeightRenaming(".block_sparse_moe.weight1", ".mlp.router.layer.projector"),
    WeightRenaming(".block_sparse_moe.weight2", ".mlp.router.layer.router"),
    WeightRenaming(".block_sparse_moe.gate.weight", ".mlp.router.weight"),
    WeightRenaming(".mlp_share.", ".mlp.shared_experts."),
    WeightConverter(
        [f"{_EXPERTS}.w1.weight", f"{_EXPERTS}.w3.weight"],
        ".mlp.experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter([f"{_EXPERTS}.w2.weight"], ".mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    *(_gates(f"{kind}_{of}", f"{kind}_{of}h") for kind in ("weight", "bias") for of in "ih"),
]
register_checkpoint_conversion_mapping(LlamaMoeRnnConfig.model_type, MAPPING)
