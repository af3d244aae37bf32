"""The plain recurrence of RMoE's ablation, the released code's ``rnn`` cell."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rmoe_megablocks.routing.parts.recurrent import RecurrentLayer, SharedCell
from rmoe_megablocks.routing.registry import register


class RNNCell(SharedCell):
    """torch.nn.RNNCell's arithmetic and parameter names."""

    gates = 1

    def forward(self, p_TP: Tensor, h_TP: Tensor | None) -> Tensor:
        """h' = tanh(W p + b + U h + b'); p, h [T, P] (None: zeros) -> [T, P]."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights(p_TP.dtype)
        h_TP = torch.zeros_like(p_TP) if h_TP is None else h_TP  # zeros: weight_hh has a gradient in every stage
        return torch.tanh(F.linear(p_TP, weight_ih, bias_ih) + F.linear(h_TP, weight_hh, bias_hh))


@register("rnn")
class RNNRouter(RecurrentLayer):
    """a plain tanh recurrence in the place of RMoE's GRU."""

    shared = RNNCell
