"""SMoE-MLP, the RMoE paper's baseline of as many parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.arguments import Argument, at_least
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RouterLayer
from rmoe_megablocks.routing.registry import register

WIDTH = Argument(
    "--moe-router-mlp-hidden-size",
    256,
    "Width of the mlp router's hidden layer.",
    check=at_least(1),
    metavar="N",
)


@register("mlp")
class MLPRouter(RouterLayer):
    """two matrices with a GELU between: logits = W2 gelu(W1 x + b1) + b2.

    Parameters: fc1 [N, H], fc1_bias [N], fc2 [E, N], fc2_bias [E].
    """

    arguments = (WIDTH,)

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.fc1 = nn.Parameter(torch.empty(config[WIDTH], config.hidden_size))
        self.fc2 = nn.Parameter(torch.empty(config.num_experts, config[WIDTH]))
        self.fc1_bias = nn.Parameter(torch.empty(config[WIDTH]))
        self.fc2_bias = nn.Parameter(torch.empty(config.num_experts))

    def route(self, x_TH: Tensor, h_TP: None, shared: None, dtype: torch.dtype):
        v_TN = F.gelu(linear_in_dtype(x_TH, self.fc1, self.fc1_bias, dtype))
        return linear_in_dtype(v_TN, self.fc2, self.fc2_bias, dtype), None
