"""What a model's layers share, as the recurrence, and a stack that hands the state through them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from megablocks.layers import common
from torch import Tensor, nn

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megablocks.arguments import router_option, router_type, routing_config
from rmoe_megablocks.megablocks.layer import RecurrentMoE, returns_bias
from rmoe_megablocks.megablocks.router import RecurrentRouter
from rmoe_megablocks.routing import SharedRouting


def share_recurrence(model: nn.Module | Iterable[nn.Module]) -> SharedRouting | None:
    """Builds what the MoE layers in ``model`` share, as the recurrence of ``gru``, and gives it to all of them.

    Call it once, when all layers are there. The layers do not register it: make it a submodule of the model, so that
    it is moved, trained and saved with it, and register it once. Of a type whose layers share nothing it is None, and
    the call only checks that the layers fit each other.

    Args:
        model: a module or several, searched for layers with a router of another type than ``linear``. Blocks of layers
            that share a projector or head (``moe_router_share_projector``) are counted in the order in which the
            layers are registered, or in that of a list.

    Returns:
        The module with the shared parameters, in the dtype and on the device of the layers' arguments; None of a type
        whose layers share nothing, as ``mlp``.

    Raises:
        UsageError: no such layer, layers that cannot belong to one model or share something already, or another
            number of them than ``num_layers``, by which each divides its balancing loss.
    """
    # a list may hold a layer twice, at two depths: it counts twice
    modules = [model] if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList) else list(model)
    routers = [m for module in modules for m in module.modules() if isinstance(m, RecurrentRouter)]
    if not routers:
        raise UsageError("all routers are MegaBlocks' own: build dMoE or MoE with another moe_router_type, as 'gru'")
    _check_agreement(routers)
    args = routers[0].args
    config = routing_config(args)
    shared = None
    if router_type(args).shares(config):
        with torch.device(args.device):
            shared = router_type(args).build_shared(config).to(common.dtype(args))
        if shared.unused_by({0}):  # what a layer uses depends on its place
            _check_places(routers)
    for index, router in enumerate(routers):
        router.bind(shared, index)
    return shared


def _check_agreement(routers: list[RecurrentRouter]) -> None:
    first = routers[0].args
    if router_type(first).shares(routing_config(first)) and any(router.bound for router in routers):
        raise UsageError("these layers share something already: call share_recurrence or RecurrentStack once")
    _agree("moe_router_type", (router_option(router.args, "moe_router_type") for router in routers))
    for argument in router_type(first).arguments:
        _agree(argument.dest, (router.routing_layer.config[argument] for router in routers))
    _agree("moe_router_dtype", (router_option(router.args, "moe_router_dtype") for router in routers))
    for name in ("num_layers", "moe_loss_weight", "device"):
        _agree(name, (getattr(router.args, name) for router in routers))
    _agree("fp16 and bf16", (common.dtype(router.args) for router in routers))
    args = routers[0].args
    if args.moe_loss_weight and args.pipeline_model_parallel_size == 1 and len(routers) != args.num_layers:
        raise UsageError(
            f"num_layers={args.num_layers}, but {len(routers)} layers have a {router_type(args).name} router: each "
            "divides its balancing loss by num_layers, set it to their number"
        )


def _check_places(routers: list[RecurrentRouter]) -> None:
    """Blocks are counted here: a part of a model, or a layer that runs twice, would count them otherwise."""
    args = routers[0].args
    if len(routers) != args.num_layers:
        raise UsageError(
            f"num_layers={args.num_layers}, but {len(routers)} layers are here: blocks of layers that share need "
            "all of them, set num_layers to their number"
        )
    if len(set(routers)) < len(routers):
        raise UsageError("a layer that runs twice cannot belong to two blocks of layers that share")


def _agree(name: str, values: Iterable) -> None:
    found = sorted(set(map(str, values)))
    if len(found) > 1:
        raise UsageError(f"layers of one model must agree on {name}, found {found}")


class RecurrentStack(nn.Module):
    """Layers one after the other with what they share, as the recurrence: ``forward(x) -> (x, aux_loss)``.

    Each layer is called as ``layer(x, router_state)`` and returns ``(x, router_state, aux_loss)``: a dMoE or MoE
    without a returned bias, or a block of yours around one, which hands the two on. A block without a MoE layer
    returns the state it got and 0.

    Args:
        layers: in the order they run; registered as ``layers``. What they share is registered as ``rnn_router``, which
            is None of a type whose layers share nothing.

    Raises:
        UsageError: a layer that does not take a state or returns its bias; and see :func:`share_recurrence`.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for index, layer in enumerate(self.layers):
            _check_takes_state(index, layer)
        self.rnn_router = share_recurrence(self.layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H] -> the last layer's output [..., H] and the sum of all layers' losses.

        Raises:
            TypeError: a layer returned something else than ``(x, router_state, aux_loss)``, or lost the state.
        """
        router_state, total = None, torch.zeros((), device=x.device)
        for index, layer in enumerate(self.layers):
            result = layer(x, router_state)
            _check_result(index, layer, result, router_state)
            x, router_state, aux_loss = result
            total = total + aux_loss
        return x, total


_RESULT = "(x, router_state, aux_loss)"


def _check_takes_state(index: int, layer: nn.Module) -> None:
    if isinstance(layer, RecurrentMoE) and returns_bias(layer):
        raise UsageError("a layer of RecurrentStack cannot return its bias: set bias or return_bias to False")
    try:
        inspect.signature(layer.forward).bind("x", "router_state")
    except TypeError:
        raise UsageError(
            f"layer {index} of RecurrentStack ({type(layer).__name__}) must take (x, router_state) and return {_RESULT}"
        ) from None


def _check_result(index: int, layer: nn.Module, result, router_state: Tensor | None) -> None:
    name = f"layer {index} of RecurrentStack ({type(layer).__name__})"
    if not isinstance(result, tuple | list) or len(result) != 3:
        found = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        raise TypeError(f"{name} must return {_RESULT}, returned {found}")
    if router_state is not None and result[1] is None:
        raise TypeError(f"{name} returned None as router_state: a block without a MoE layer returns the one it got")
