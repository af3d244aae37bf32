"""Omni-Router (arXiv 2507.05724): one router for all layers."""

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RouterLayer
from rmoe_megablocks.routing.parts.initialisation import draw
from rmoe_megablocks.routing.parts.shared import SharedRouting
from rmoe_megablocks.routing.registry import register


class SharedMatrix(SharedRouting):
    """One matrix for all layers; parameter weight [E, H]."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        draw(config, self.weight)

    def forward(self, x_TH: Tensor, dtype: torch.dtype) -> Tensor:
        """x [..., H] -> logits [..., E] in ``dtype``."""
        return linear_in_dtype(x_TH, self.cast(self.weight, dtype), None, dtype)


@register("omni")
class OmniRouter(RouterLayer):
    """Omni-Router: one matrix for all layers; no layer owns anything."""

    shared = SharedMatrix

    def route(self, x_TH: Tensor, h_TP: None, shared: SharedMatrix, dtype: torch.dtype):
        return shared(x_TH, dtype), None
