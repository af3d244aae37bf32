"""RMoE's router (Eq. 2-6)."""

import torch
from torch import Tensor

from rmoe_megablocks.kernels import gru_route, gru_step
from rmoe_megablocks.routing.parts.implementation import EAGER, IMPL, RECOMPUTE, TRITON, chosen
from rmoe_megablocks.routing.parts.recurrent import STATE_SIZE, RecurrentLayer, SharedCell
from rmoe_megablocks.routing.registry import register


class GRUCell(SharedCell):
    """torch.nn.GRUCell's arithmetic and parameter names; gates in the order reset, update, candidate."""

    gates = 3

    def forward(self, p_TP: Tensor, h_TP: Tensor | None, impl: str = EAGER, head: tuple[Tensor | None, ...] = ()):
        """p_TP [T, P], h_TP [T, P] or None for h_0 = 0 -> the next state [T, P], in the dtype of ``p_TP``.

        With ``impl`` triton: (logits [T, E], state), of the router matrix and bias in ``head``, without it logits of
        no elements.
        """
        weights = self.weights(p_TP.dtype)
        if impl == TRITON:
            return gru_route(p_TP, h_TP, *weights, *head, bf16_weights=self.weight_ih.dtype == torch.bfloat16)
        return gru_step(p_TP, h_TP, *weights, recompute=impl == RECOMPUTE)


@register("gru")
class GRURouter(RecurrentLayer):
    """RMoE: a GRU shared by all layers carries a routing state from layer to layer."""

    shared = GRUCell
    implementations = True

    def route(self, x_TH: Tensor, h_TP: Tensor | None, shared: GRUCell, dtype: torch.dtype):
        config = self.config
        size, experts = config[STATE_SIZE], config.num_experts
        impl = chosen(config[IMPL], x_TH.device, dtype, shared.weight_ih.dtype, size, experts)
        p_TP = self.project(x_TH, shared, dtype)
        if impl != TRITON:
            return self.read_out(shared(p_TP, h_TP, impl), shared, dtype)
        if self.router is None or type(self).read is not RecurrentLayer.read:
            _, h_TP = shared(p_TP, h_TP, impl)
            return self.read_out(h_TP, shared, dtype)
        return shared(p_TP, h_TP, impl, (self.router, self.router_bias))
