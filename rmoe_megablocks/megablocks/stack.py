"""The recurrence that a model's layers share, and a stack that hands the state through them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megablocks.layers import common
from torch import Tensor, nn

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megablocks.arguments import router_option, router_type, routing_config
from rmoe_megablocks.megablocks.layer import RecurrentMoE
from rmoe_megablocks.megablocks.router import RecurrentRouter
from rmoe_megablocks.routing.registry import SharedCell


def share_recurrence(model: nn.Module | Iterable[nn.Module]) -> SharedCell:
    """Builds the recurrence for the MoE layers in ``model`` and gives it to all of them.

    Call it once, when all layers are there. The layers do not register it: make it a submodule of the model, so that
    it is moved, trained and saved with it, and register it once.

    Args:
        model: a module or several, searched for layers with a recurrent router.

    Returns:
        The module with the shared parameters, in the dtype and on the device of the layers' arguments.

    Raises:
        UsageError: no such layer, or layers that cannot share a recurrence.
    """
    modules = [model] if isinstance(model, nn.Module) else list(model)
    routers = [m for module in modules for m in module.modules() if isinstance(m, RecurrentRouter)]
    if not routers:
        raise UsageError("no layer with a recurrent router: build dMoE or MoE with moe_router_type='gru'")
    names = ("moe_router_type", "moe_router_rnn_hidden_size", "moe_router_rnn_init", "moe_router_dtype")
    for name in names:
        values = {router_option(router.args, name) for router in routers}
        if len(values) > 1:
            raise UsageError(f"layers of one recurrence must agree on {name}, found {sorted(map(str, values))}")
    args = routers[0].args
    with torch.device(args.device):
        cell = router_type(args).build_shared(routing_config(args)).to(common.dtype(args))
    for router in routers:
        router.bind(cell)
    return cell


class RecurrentStack(nn.Module):
    """Layers one after the other with the recurrence they share: ``forward(x) -> (x, aux_loss)``.

    Each layer is called as ``layer(x, router_state)`` and returns ``(x, router_state, aux_loss)``: a dMoE or MoE
    without a returned bias, or a block of yours around one, which hands the two on. A block without a MoE layer
    returns the state it got and 0.

    Args:
        layers: in the order they run; registered as ``layers``. The recurrence is registered as ``rnn_router``.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        moe_layers = [layer for layer in self.layers if isinstance(layer, RecurrentMoE)]
        if any(layer.experts.bias is not None and layer.experts.args.return_bias for layer in moe_layers):
            raise UsageError("a layer of RecurrentStack cannot return its bias: set bias or return_bias to False")
        self.rnn_router = share_recurrence(self.layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H] -> the last layer's output [..., H] and the sum of all layers' losses."""
        router_state, total = None, torch.zeros((), device=x.device)
        for layer in self.layers:
            x, router_state, aux_loss = layer(x, router_state)
            total = total + aux_loss
        return x, total
