"""The GRU step as operations that torch.compile takes whole; see :mod:`.gru_step` for what they compute.

Nothing inside is traced, so that in-place work and strided results stay what they are. Operations have no optional
results: "no gradient of h" is a tensor of no elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmoe_megablocks.kernels import gru_arithmetic


@torch.library.custom_op("rmoe::gru_step", mutates_args=())
def gru_step(
    x: Tensor, h: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """State [..., P], gates [T, 3P], U_n h [T, P]: as :func:`.gru_arithmetic.forward`."""
    return gru_arithmetic.forward(x, h, weight_ih, weight_hh, bias_ih, bias_hh)


@torch.library.custom_op("rmoe::gru_recompute", mutates_args=())
def gru_recompute(
    x: Tensor, h: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """The state [..., P] alone."""
    return gru_arithmetic.forward(x, h, weight_ih, weight_hh, bias_ih, bias_hh)[0]


@torch.library.custom_op("rmoe::gru_backward", mutates_args=())
def gru_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor | None,
    gates: Tensor | None,
    recurrent_n: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, h, weight_ih, weight_hh, bias_ih, bias_hh: as :func:`.gru_arithmetic.backward`."""
    grads = gru_arithmetic.backward(grad, x, h, gates, recurrent_n, weight_ih, weight_hh, bias_ih, bias_hh)
    return grads[0], x.new_empty(0) if h is None else grads[1], *grads[2:]


@gru_step.register_fake
def _(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    size = weight_hh.shape[1]
    rows = x.numel() // size
    kept = x.new_empty(0 if h is None else rows, size)
    return x.new_empty(x.shape), x.new_empty(rows, 3 * size), kept


@gru_recompute.register_fake
def _(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    return x.new_empty(x.shape)


@gru_backward.register_fake
def _(grad, x, h, gates, recurrent_n, weight_ih, weight_hh, bias_ih, bias_hh):
    like = (weight_ih, weight_hh, bias_ih, bias_hh)
    grad_h = x.new_empty(0) if h is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), grad_h, *(torch.empty_like(tensor) for tensor in like)


def _keep_gates(ctx, inputs, output):
    x, h, *weights = inputs
    _, gates, recurrent_n = output
    ctx.mark_non_differentiable(gates, recurrent_n)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, gates, recurrent_n, *weights)


def _keep_inputs(ctx, inputs, output):
    x, h, *weights = inputs
    ctx.save_for_backward(x, h, None, None, *weights)


def _gradients(ctx, grad, *_):
    saved = ctx.saved_tensors  # read once: a checkpoint raises at the second time
    if grad is None:
        return (None,) * 6
    grad_x, grad_h, *others = gru_backward(grad, *saved)
    return grad_x, None if saved[1] is None else grad_h, *others


gru_step.register_autograd(_gradients, setup_context=_keep_gates)
gru_recompute.register_autograd(_gradients, setup_context=_keep_inputs)
