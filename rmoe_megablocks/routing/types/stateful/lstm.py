"""The LSTM of RMoE's ablation: a state of twice the width."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.parts.recurrent import STATE_SIZE, RecurrentLayer, SharedCell
from rmoe_megablocks.routing.registry import register


class LSTMCell(SharedCell):
    """torch.nn.LSTMCell's arithmetic and parameter names; gates in the order input, forget, cell, output."""

    gates = 4

    def forward(self, p_TP: Tensor, hc_TP: Tensor | None) -> Tensor:
        """p_TP [T, P], (h, c) [T, 2P] or None for zeros -> (h', c') [T, 2P]."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights(p_TP.dtype)
        if hc_TP is None:  # zeros: weight_hh has a gradient in every stage
            hc_TP = torch.zeros((*p_TP.shape[:-1], 2 * p_TP.shape[-1]), dtype=p_TP.dtype, device=p_TP.device)
        h_TP, c_TP = hc_TP.chunk(2, dim=-1)
        gates = F.linear(p_TP, weight_ih, bias_ih) + F.linear(h_TP, weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        c_TP = f.sigmoid() * c_TP + i.sigmoid() * g.tanh()
        return torch.cat((o.sigmoid() * c_TP.tanh(), c_TP), dim=-1)


@register("lstm")
class LSTMRouter(RecurrentLayer):
    """an LSTM in the place of RMoE's GRU: hidden and cell state travel, the head reads the first."""

    shared = LSTMCell

    @classmethod
    def own_state_size(cls, config: RoutingConfig) -> int:
        return 2 * config[STATE_SIZE]

    def read(self, h: Tensor) -> Tensor:
        return h.chunk(2, dim=-1)[0]
