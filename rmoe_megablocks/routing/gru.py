"""The GRU that all MoE layers share (Eq. 2, 3, 5), and its entry in the registry."""

import math

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import gru_step
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.registry import RouterType, SharedCell, register


class GRUCell(SharedCell):
    """torch.nn.GRUCell's arithmetic and parameter names, with input and state of one width P.

    Parameters: weight_ih, weight_hh [3P, P], bias_ih, bias_hh [3P], gates in the order reset, update, candidate.
    """

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        size = config.state_size
        self.weight_ih = nn.Parameter(torch.empty(3 * size, size))
        self.weight_hh = nn.Parameter(torch.empty(3 * size, size))
        self.bias_ih = nn.Parameter(torch.empty(3 * size))
        self.bias_hh = nn.Parameter(torch.empty(3 * size))
        self._config = config
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew by ``rnn_init`` of the :class:`RoutingConfig`."""
        bound = 1 / math.sqrt(self._config.state_size)
        for parameter in self.parameters():
            if self._config.rnn_init == "standard":
                parameter.uniform_(-bound, bound)
            else:
                self._config.init_method(parameter)

    def forward(self, p_TP: Tensor, h_TP: Tensor | None) -> Tensor:
        """p_TP [T, P], h_TP [T, P] or None for h_0 = 0 -> the next state [T, P], in the dtype of ``p_TP``."""
        dtype = p_TP.dtype
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return gru_step(p_TP, h_TP, *(self.cast(weight, dtype) for weight in weights))


register(
    RouterType(
        "gru",
        "RMoE: a GRU shared by all layers carries a routing state from layer to layer",
        state_size=lambda config: config.state_size,
        build_shared=GRUCell,
    )
)
