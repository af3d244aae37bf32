"""A linear map computed in another dtype than its input is kept in."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_in_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``F.linear`` on operands converted to ``dtype``; x [..., K], weight [N, K], bias [N] -> [..., N] in ``dtype``.

    Routing in fp32 under bf16 training reads hidden states that the layer keeps in bf16 anyway: converting inside
    the operation saves the fp32 copy that autograd would otherwise hold until the backward pass.
    """
    if x.dtype == weight.dtype == dtype:
        return F.linear(x, weight, bias)
    return _LinearInDtype.apply(x, weight, bias, dtype)


class _LinearInDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_rows.mT @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
