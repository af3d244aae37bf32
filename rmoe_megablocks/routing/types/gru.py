"""RMoE's router (Eq. 2-6)."""

from torch import Tensor

from rmoe_megablocks.kernels import gru_step
from rmoe_megablocks.routing.recurrent import RecurrentLayer, SharedCell
from rmoe_megablocks.routing.registry import register


class GRUCell(SharedCell):
    """torch.nn.GRUCell's arithmetic and parameter names; gates in the order reset, update, candidate."""

    gates = 3

    def forward(self, p_TP: Tensor, h_TP: Tensor | None) -> Tensor:
        """p_TP [T, P], h_TP [T, P] or None for h_0 = 0 -> the next state [T, P], in the dtype of ``p_TP``."""
        return gru_step(p_TP, h_TP, *self.weights(p_TP.dtype))


@register("gru")
class GRURouter(RecurrentLayer):
    """RMoE: a GRU shared by all layers carries a routing state from layer to layer."""

    shared = GRUCell
