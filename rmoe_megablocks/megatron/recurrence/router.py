"""Megatron's TopKRouter with its logits coming from the recurrence."""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from rmoe_megablocks.routing import LayerRouting


class RecurrentTopKRouter(TopKRouter):
    """Replaces only how logits come about: scoring, balancing, dropping and dispatch stay Megatron's.

    The transformer layer hands the state in with :meth:`put_state` before the MoE layer runs and fetches the next
    one with :meth:`take_state` after it. Both happen within one call of the layer, so that whatever recomputes the
    layer replays them; nothing outlives the call.
    """

    def reset_parameters(self) -> None:
        """Called by Megatron's constructor in place of its own: no gate matrix, a projector and a router instead."""
        self.weight = None
        self.bias = None
        self.routing_layer = LayerRouting(self.config.routing)
        for parameter in self.routing_layer.parameters():
            parameter.data = parameter.data.to(self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel
        self._cell: tuple[nn.Module, ...] = ()
        self._state: list[Tensor | None] = []

    def bind(self, cell: nn.Module) -> None:
        """Sets the recurrence that all layers of this process share. Kept in a tuple: it is not this module's child."""
        self._cell = (cell,)

    def put_state(self, h_SBP: Tensor | None) -> None:
        """Hands in the state of the previous MoE layer [S, B, P], None before the first one."""
        self._state = [h_SBP]

    def take_state(self) -> Tensor:
        """Fetches the state of this layer [S, B, P] and forgets it."""
        (h_SBP,) = self._state
        self._state = []
        return h_SBP

    @property
    def state(self) -> Tensor | None:
        """The state at hand: this layer's once :meth:`gating` has run."""
        return self._state[0]

    def gating(self, input: Tensor) -> Tensor:  # Megatron's name
        """Hidden states [S, B, H] -> logits [S, B, E] in the dtype of ``--moe-router-dtype``."""
        (cell,) = self._cell
        h_SBP = self.take_state()
        logits_SBE, h_SBP = self.routing_layer(input, h_SBP, cell, router_dtype(self.config) or input.dtype)
        self.put_state(h_SBP)
        return logits_SBE


def router_dtype(config) -> torch.dtype | None:
    """Dtype that ``--moe-router-dtype`` asks for, None when routing follows its input."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype)
