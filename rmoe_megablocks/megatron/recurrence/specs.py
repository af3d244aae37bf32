"""Megatron's layer specifications with parts of their MoE layers replaced; routers, null experts and experts use it."""

import dataclasses
from collections.abc import Callable
from functools import partial

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

BlockSpec = Callable[..., TransformerBlockSubmodules]


def changed(change: Callable[[ModuleSpec], ModuleSpec], block_spec: BlockSpec = default_layer_spec) -> BlockSpec:
    """What ``block_spec`` makes for a stage, each of its layers' specifications through ``change``."""
    return partial(_changed, change=change, block_spec=block_spec)


def _changed(model_config: GPTModelConfig, vp_stage: int | None = None, *, change, block_spec):
    block = block_spec(model_config, vp_stage)
    return dataclasses.replace(block, layer_specs=[change(spec) for spec in block.layer_specs])


def moe_layer(spec: ModuleSpec) -> type[MoELayer] | None:
    """The class of a layer's MoE layer, None of a dense one."""
    layer = getattr(getattr(spec.submodules, "mlp", None), "func", None)
    return layer if isinstance(layer, type) and issubclass(layer, MoELayer) else None


def moe_part(spec: ModuleSpec, name: str) -> type:
    """A part, as ``router``, of a layer that has a MoE layer."""
    return getattr(spec.submodules.mlp.keywords["submodules"], name)


def with_moe(spec: ModuleSpec, layer: type[MoELayer], **parts: type) -> ModuleSpec:
    """``spec`` with MoE layers of class ``layer`` and other ``parts``."""
    keywords = spec.submodules.mlp.keywords
    moe = dataclasses.replace(keywords["submodules"], **parts)
    mlp = partial(layer, **{**keywords, "submodules": moe})
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, mlp=mlp))
