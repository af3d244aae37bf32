"""One GRU step with a hand-written backward: two matrix products, in-place pointwise work, five tensors kept.

The naive form is :func:`rmoe_megablocks.routing.reference.gru_step`. Left to autograd, the step keeps about twice
as many [T, P] tensors and runs three times as many small pointwise operations.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gru_step(
    x: Tensor, h: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """The next state [..., P] from x and h [..., P] (None: zeros) and GRUCell's parameters, all of one dtype."""
    return _GRUStep.apply(x, h, weight_ih, weight_hh, bias_ih, bias_hh)


class _GRUStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, weight_ih, weight_hh, bias_ih, bias_hh):
        size = weight_hh.shape[1]
        gates = F.linear(x, weight_ih, bias_ih)
        if h is None:  # U h_0 = 0: only its bias is left
            recurrent_n = bias_hh[2 * size :].expand_as(gates[..., 2 * size :])
            gates[..., : 2 * size] += bias_hh[: 2 * size]
        else:
            recurrent = F.linear(h, weight_hh, bias_hh)
            recurrent_n = recurrent[..., 2 * size :].contiguous()  # the other two thirds need not be kept
            gates[..., : 2 * size] += recurrent[..., : 2 * size]
        s, z, n = gates.split(size, dim=-1)
        gates[..., : 2 * size].sigmoid_()
        n.addcmul_(s, recurrent_n).tanh_()
        ctx.save_for_backward(x, h, gates, recurrent_n, weight_ih, weight_hh)
        return n - z * n if h is None else torch.lerp(n, h, z)

    @staticmethod
    def backward(ctx, grad):
        x, h, gates, recurrent_n, weight_ih, weight_hh = ctx.saved_tensors
        size = weight_hh.shape[1]
        s, z, n = gates.split(size, dim=-1)
        grad_gates = torch.empty_like(gates)
        grad_s, grad_z, grad_n = grad_gates.split(size, dim=-1)
        # h' = n + z (h - n); tanh' = 1 - n^2; sigmoid' = s (1 - s)
        torch.mul(grad - grad * z, 1 - n * n, out=grad_n)
        torch.mul(grad * (-n if h is None else h - n), z - z * z, out=grad_z)
        torch.mul(grad_n * recurrent_n, s - s * s, out=grad_s)
        grad_recurrent = torch.cat((grad_gates[..., : 2 * size], grad_n * s), dim=-1)

        rows_gates, rows_recurrent = grad_gates.flatten(0, -2), grad_recurrent.flatten(0, -2)
        grad_x = grad_gates @ weight_ih
        grad_weight_ih = rows_gates.mT @ x.flatten(0, -2)
        grad_bias_ih = rows_gates.sum(0)
        grad_bias_hh = rows_recurrent.sum(0)
        if h is None:
            # Zeros rather than None: a stage whose only MoE layer is the model's first must still report a
            # gradient of weight_hh, or Megatron's overlapped gradient reduction waits for it for ever.
            return grad_x, None, grad_weight_ih, torch.zeros_like(weight_hh), grad_bias_ih, grad_bias_hh
        grad_h = torch.addcmul(grad_recurrent @ weight_hh, grad, z)
        grad_weight_hh = rows_recurrent.mT @ h.flatten(0, -2)
        return grad_x, grad_h, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh
