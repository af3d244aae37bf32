"""ZAYA1's router with exponential depth averaging (transformers' models/zaya, ZayaRouter)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RECURRENCE, RouterLayer
from rmoe_megablocks.routing.parts.initialisation import draw
from rmoe_megablocks.routing.parts.recurrent import STATE_SIZE
from rmoe_megablocks.routing.registry import register

_EPSILON = 1e-5


@register("eda")
class EDARouter(RouterLayer):
    """ZAYA1: a weighted sum of all layers' projections, read by an MLP of three matrices.

    r_l = W x + b + gamma * r_{l-1}; logits = W3 gelu(W2 gelu(W1 rmsnorm(r_l) + b1) + b2).
    Parameters: projector [P, H], fc1, fc2 [P, P], router [E, P]; projector_bias, fc1_bias, fc2_bias, norm, gamma [P].
    """

    arguments = (STATE_SIZE, RECURRENCE)

    @classmethod
    def own_state_size(cls, config: RoutingConfig) -> int:
        return config[STATE_SIZE]

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size = config[STATE_SIZE]
        self.projector = nn.Parameter(torch.empty(size, config.hidden_size))
        self.fc1 = nn.Parameter(torch.empty(size, size))
        self.fc2 = nn.Parameter(torch.empty(size, size))
        self.router = nn.Parameter(torch.empty(config.num_experts, size))
        for name in ("projector_bias", "fc1_bias", "fc2_bias", "norm", "gamma"):
            self.register_parameter(name, nn.Parameter(torch.empty(size)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices and biases by ``--moe-router-init``; norm and gamma are 1, as in ZAYA1."""
        for weight, bias in (
            (self.projector, self.projector_bias),
            (self.fc1, self.fc1_bias),
            (self.fc2, self.fc2_bias),
            (self.router, None),
        ):
            draw(self.config, weight, bias)
        self.norm.fill_(1)
        self.gamma.fill_(1)

    def route(self, x_TH: Tensor, h_TP: Tensor | None, shared: None, dtype: torch.dtype):
        r_TP = linear_in_dtype(x_TH, self.projector, self.projector_bias, dtype)
        # zeros rather than nothing: gamma has a gradient, which overlapped reductions wait for
        r_TP = r_TP + self.gamma.to(dtype) * (torch.zeros_like(r_TP) if h_TP is None else h_TP)
        v_TP = F.rms_norm(r_TP, r_TP.shape[-1:], self.norm.to(dtype), _EPSILON)
        v_TP = F.gelu(linear_in_dtype(v_TP, self.fc1, self.fc1_bias, dtype))
        v_TP = F.gelu(linear_in_dtype(v_TP, self.fc2, self.fc2_bias, dtype))
        return linear_in_dtype(v_TP, self.router, None, dtype), r_TP
