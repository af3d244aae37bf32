"""HyperRouter (giangdip2410/HyperRouter, custom_gate.py): a frozen network makes the router matrix of an embedding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe_megablocks.routing.arguments import Argument, at_least
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RouterLayer
from rmoe_megablocks.routing.parts.initialisation import fan_in_
from rmoe_megablocks.routing.registry import register

WIDTH = Argument(
    "--moe-router-hyper-hidden-size",
    256,
    "Width of the hyper router's frozen network.",
    check=at_least(1),
    metavar="N",
)


@register("hyper")
class HyperRouter(RouterLayer):
    """HyperRouter: a frozen network of each layer makes its router matrix from a trained embedding.

    (W | b) = V2 relu(V1 e + c1) + c2 as [E, H + 1]; logits = W x + b. Parameters: embedding [1, H], trained; frozen
    fc1 [N, H], fc1_bias [N], fc2 [E(H + 1), N], fc2_bias [E(H + 1)], drawn as torch.nn.Linear's.
    """

    arguments = (WIDTH,)

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        width, outputs = config[WIDTH], config.num_experts * (config.hidden_size + 1)
        self.embedding = nn.Parameter(torch.empty(1, config.hidden_size))
        for name, shape in (
            ("fc1", (width, config.hidden_size)),
            ("fc2", (outputs, width)),
            ("fc1_bias", (width,)),
            ("fc2_bias", (outputs,)),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The embedding N(0, 1), the network U(+-1/sqrt(inputs)), whatever ``--moe-router-init``."""
        self.embedding.normal_()
        fan_in_(self.fc1, self.fc1_bias)
        fan_in_(self.fc2, self.fc2_bias)

    def route(self, x_TH: Tensor, h_TP: None, shared: None, dtype: torch.dtype):
        v_N = F.relu(F.linear(self.embedding.to(dtype), self.fc1.to(dtype), self.fc1_bias.to(dtype)))
        made = F.linear(v_N, self.fc2.to(dtype), self.fc2_bias.to(dtype)).view(self.config.num_experts, -1)
        return F.linear(x_TH.to(dtype), made[:, :-1], made[:, -1]), None
