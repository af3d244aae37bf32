"""RandomSMoE: a router that is never trained."""

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RouterLayer
from rmoe_megablocks.routing.registry import register


@register("random")
class RandomRouter(RouterLayer):
    """one matrix a layer, frozen as it is drawn; parameter weight [E, H]."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size), requires_grad=False)

    def route(self, x_TH: Tensor, h_TP: None, shared: None, dtype: torch.dtype):
        return linear_in_dtype(x_TH, self.weight, None, dtype), None
