"""Puts null experts into a Megatron model that is about to be built, whatever its router."""

import argparse

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.null_experts.dispatch import VaryingAlltoAllTokenDispatcher
from rmoe_megablocks.megatron.null_experts.options import OPTION
from rmoe_megablocks.megatron.null_experts.router import WITH_NULL_EXPERTS, NullExperts
from rmoe_megablocks.megatron.recurrence import specs
from rmoe_megablocks.routing.parts.null_experts import expected_real_experts


def install_null_experts(model_config: GPTModelConfig, args: argparse.Namespace) -> None:
    """Makes ``model_config``, its router chosen, build routers with null experts. Changed in place."""
    model_config.transformer.moe_null_experts = args.moe_null_experts
    block_spec = model_config.transformer_layer_spec or default_layer_spec
    model_config.transformer_layer_spec = specs.changed(_with_null_experts, block_spec)
    model_config.pre_wrap_hooks.append(_check_routers)
    megatron_hooks.use_alltoall_dispatcher(VaryingAlltoAllTokenDispatcher)
    megatron_hooks.count_experts(_expected_topk)


def _expected_topk(args: argparse.Namespace) -> float:
    """Experts of a token in Megatron's FLOPs: with null experts those that balanced routing gives it."""
    null_experts = getattr(args, "moe_null_experts", 0)
    if not null_experts:
        return args.moe_router_topk
    return expected_real_experts(args.moe_router_topk, args.num_experts, null_experts)


def _with_null_experts(spec: ModuleSpec) -> ModuleSpec:
    layer = specs.moe_layer(spec)
    if layer is None:
        return spec  # a dense layer
    router = specs.moe_part(spec, "router")
    if router not in WITH_NULL_EXPERTS:
        raise UsageError(f"{OPTION}: a {router.__name__} cannot have null experts; leave it out")
    return specs.with_moe(spec, layer, router=WITH_NULL_EXPERTS[router])


def _check_routers(chunks: list[GPTModel]) -> list[GPTModel]:
    """Layers of another making would route without null experts, and without a word."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, TopKRouter) and not isinstance(module, NullExperts):
            raise UsageError(f"{OPTION}: a {type(module).__name__} has no null experts; leave it out")
    return chunks
