"""Puts the recurrent router into a Megatron model that is about to be built."""

import dataclasses
from functools import partial

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelConfig

from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import balancing
from rmoe_megablocks.megatron.checkpoints import upcycling
from rmoe_megablocks.megatron.command_line import router_arguments
from rmoe_megablocks.megatron.experts.backend import MEGABLOCKS
from rmoe_megablocks.megatron.null_experts.install import install_null_experts
from rmoe_megablocks.megatron.recurrence import specs, stage_boundary
from rmoe_megablocks.megatron.recurrence.layer import RecurrentMoELayer, RecurrentTransformerLayer
from rmoe_megablocks.megatron.recurrence.router import FanInTopKRouter, RecurrentTopKRouter
from rmoe_megablocks.megatron.recurrence.shared import SharedRecurrence
from rmoe_megablocks.megatron.recurrence.stage_boundary import StateP2PCommunicator
from rmoe_megablocks.routing import FAN_IN, RouterType, get_router_type


def install_router(model_config: GPTModelConfig, args) -> None:
    """Makes ``model_config`` build a model with the router and the experts that the arguments name.

    Call it between ``gpt_config_from_args(args)`` and ``pretrain``. A ``linear`` model with Megatron's experts,
    sum of load-balancing losses and initialisation is left untouched.

    Args:
        model_config: from ``gpt_config_from_args``; changed in place.
        args: parsed arguments, see :mod:`rmoe_megablocks.megatron.arguments`.
    """
    balancing.apply_reduction(model_config.transformer, args)
    router_type = router_arguments.router_type(args)
    if router_type.replaces_hosts:
        _install_recurrence(model_config, args, router_type)
    elif args.moe_router_init == FAN_IN:
        _install_fan_in(model_config)
    if args.moe_null_experts:
        install_null_experts(model_config, args)
    if args.moe_backend == MEGABLOCKS:
        from rmoe_megablocks.megatron.experts.megablocks_layer import use_megablocks  # MegaBlocks need not be installed

        use_megablocks(model_config)


def _install_recurrence(model_config: GPTModelConfig, args, router_type: RouterType) -> None:
    config = model_config.transformer
    config.moe_router_type = router_type.name
    config.routing = router_arguments.routing_config(args, config.init_method)
    config.router_state_size = router_type.state_size(config.routing)
    config.has_cond_embedder = True  # finalize_model_grads sums the gradients of SharedRecurrence over stages
    model_config.transformer_layer_spec = specs.changed(_recurrent_layer_spec)
    model_config.pre_wrap_hooks.append(partial(connect_stages, seed=args.seed))
    if args.moe_router_upcycle:
        model_config.pre_wrap_hooks.append(partial(upcycling.keep_fresh_routing, args=args))
    megatron_hooks.use_p2p_communicator(StateP2PCommunicator)
    megatron_hooks.change_mtp_layers(_mtp_layer_spec)


def _install_fan_in(model_config: GPTModelConfig) -> None:
    model_config.transformer_layer_spec = specs.changed(_fan_in_layer_spec)
    model_config.pre_wrap_hooks.append(_check_fan_in)
    model_config.transformer.moe_router_init = FAN_IN
    megatron_hooks.change_mtp_layers(_mtp_layer_spec)


def _fan_in_layer_spec(spec: ModuleSpec) -> ModuleSpec:
    """A linear router that is drawn by its inputs' number."""
    return specs.with_moe(spec, MoELayer, router=FanInTopKRouter) if specs.moe_layer(spec) is MoELayer else spec


def _check_fan_in(chunks: list[GPTModel]) -> list[GPTModel]:
    """Layers of another making would keep Megatron's initialisation without a word."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, TopKRouter) and not isinstance(module, FanInTopKRouter):
            raise UsageError(f"--moe-router-init {FAN_IN}: a {type(module).__name__} cannot be drawn so; leave it out")
    return chunks


def _mtp_layer_spec(model_config: GPTModelConfig, spec: ModuleSpec) -> ModuleSpec:
    """A multi-token prediction layer's inner transformer layer, with the router that the model has.

    Nobody hands a recurrent one a state, so it starts from h_0 = 0: its input belongs to two tokens, of which the
    decoder's state has followed one, and the layer is left out at inference, which must not depend on it.
    """
    if hasattr(model_config.transformer, "routing"):
        return _recurrent_layer_spec(spec)
    return _fan_in_layer_spec(spec) if hasattr(model_config.transformer, "moe_router_init") else spec


def _recurrent_layer_spec(spec: ModuleSpec) -> ModuleSpec:
    """Our layer, MoE layer and router in the places of Megatron's."""
    if spec.module is not TransformerLayer:
        raise UsageError(f"--moe-router-type: layers of type {spec.module.__name__} cannot hand on a routing state")
    if specs.moe_layer(spec) is MoELayer:
        spec = specs.with_moe(spec, RecurrentMoELayer, router=RecurrentTopKRouter)
    return dataclasses.replace(spec, module=RecurrentTransformerLayer)


def connect_stages(chunks: list[GPTModel], seed: int) -> list[GPTModel]:
    """Gives this process's model chunks their shared recurrence and marks where the state enters and leaves.

    Runs before Megatron wraps the chunks in Float16Module and DDP, so that both see the shared parameters. They
    are registered at model level: their name does not depend on which layers a stage holds.
    """
    config, shared = chunks[0].config, None
    if get_router_type(config.moe_router_type).shares(config.routing):
        shared = SharedRecurrence(config, chunks[0].pg_collection, seed)
        chunks[0].rnn_router = shared  # last submodule: see SharedRecurrence
    for chunk in chunks:
        if config.router_state_size:
            stage_boundary.connect(chunk)
        routers = [module for module in chunk.modules() if isinstance(module, RecurrentTopKRouter)]
        for router in routers:
            router.bind(None if shared is None else shared.cell)
        if chunk is chunks[0] and shared is not None:
            shared.report_unused(chunk, {router.routing_layer.index for router in routers})
    return chunks
