"""One GRU step with a hand-written backward, in two forms: gates kept, or computed again from x and h.

The naive form is :func:`rmoe_megablocks.routing.reference.gru_step`. Left to autograd, the step keeps about twice
as many [T, P] tensors as the form with gates, and runs three times as many small pointwise operations.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe_megablocks.kernels import gru_arithmetic, gru_ops


def gru_step(
    x: Tensor,
    h: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    recompute: bool = False,
) -> Tensor:
    """The next state [..., P] from x and h [..., P] (None: zeros) and GRUCell's parameters, all of one dtype.

    Args:
        recompute: keeps x and h alone for the backward pass (2P values a token in the place of 6P, the state
            counted), which then does the forward's two products again.
    """
    if torch.compiler.is_compiling():  # an operation of torch's, which takes more of the host's time
        if recompute:
            return gru_ops.gru_recompute(x, h, weight_ih, weight_hh, bias_ih, bias_hh)
        return gru_ops.gru_step(x, h, weight_ih, weight_hh, bias_ih, bias_hh)[0]
    return _GRUStep.apply(x, h, weight_ih, weight_hh, bias_ih, bias_hh, recompute)


class _GRUStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, weight_ih, weight_hh, bias_ih, bias_hh, recompute):
        following, gates, recurrent_n = gru_arithmetic.forward(x, h, weight_ih, weight_hh, bias_ih, bias_hh)
        kept = (None, None) if recompute else (gates, recurrent_n)
        biases = (bias_ih, bias_hh) if recompute else (None, bias_hh if h is None else None)  # where they are read
        ctx.save_for_backward(x, h, *kept, weight_ih, weight_hh, *biases)
        return following

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *gru_arithmetic.backward(grad, *ctx.saved_tensors), None
