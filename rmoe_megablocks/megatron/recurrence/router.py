"""Megatron's TopKRouter with its logits coming from the recurrence, and one with its own matrix drawn otherwise."""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from rmoe_megablocks.routing import StateSlot, fan_in_, get_router_type


class FanInTopKRouter(TopKRouter):
    """The linear router with ``--moe-router-init fan_in``: only the numbers that it starts from are others."""

    def reset_parameters(self) -> None:
        """Called by Megatron's constructor, at the place in the order of draws where its own draws."""
        if self.config.perform_initialization:
            fan_in_(self.weight, self.bias)
        for parameter in filter(lambda parameter: parameter is not None, (self.weight, self.bias)):
            parameter.data = parameter.data.to(self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel


class RecurrentTopKRouter(TopKRouter):
    """Replaces only how logits come about: scoring, balancing, dropping and dispatch stay Megatron's.

    The transformer layer hands the state in by :attr:`slot` before the MoE layer runs and fetches the next one after
    it. Both happen within one call of the layer, so that whatever recomputes the layer replays them; nothing outlives
    the call, and a call that runs the router more or less often than once raises, see :class:`StateSlot`.
    """

    def reset_parameters(self) -> None:
        """Called by Megatron's constructor in place of its own: no gate matrix, what the router type gives a layer."""
        self.weight = None
        self.bias = None
        self.routing_layer = get_router_type(self.config.moe_router_type).build_layer(self.config.routing)
        for parameter in self.routing_layer.parameters():
            parameter.data = parameter.data.to(self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel
        self._shared: tuple[nn.Module | None, ...] = ()
        self.slot = StateSlot()

    def bind(self, shared: nn.Module | None) -> None:
        """Sets what all layers of this process share. Kept in a tuple: it is not this module's child."""
        self._shared = (shared,)

    def set_layer_number(self, layer_number: int) -> None:
        """Also tells the routing its place among the model's layers."""
        super().set_layer_number(layer_number)
        self.routing_layer.index = layer_number - 1

    @property
    def state(self) -> Tensor | None:
        """This layer's state [S, B, P], None of a type without one; from :meth:`gating` until the layer fetches it."""
        return self.slot.state

    def gating(self, input: Tensor) -> Tensor:  # Megatron's name
        """Hidden states [S, B, H] -> logits [S, B, E] in the dtype of ``--moe-router-dtype``.

        Raises:
            RoutingStateError: called a second time for one state, or without one.
        """
        (shared,) = self._shared
        dtype = router_dtype(self.config) or input.dtype
        return self.slot.step(lambda h_SBP: self.routing_layer(input, h_SBP, shared, dtype))


def router_dtype(config) -> torch.dtype | None:
    """Dtype that ``--moe-router-dtype`` asks for, None when routing follows its input."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype)
