"""A linear map computed in another dtype than its input is kept in."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rmoe_megablocks.kernels.gru_arithmetic import exact_dtypes
from rmoe_megablocks.kernels.products import LOW, mm_fp32


def linear_in_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``F.linear`` on operands converted to ``dtype``; x [..., K], weight [N, K], bias [N] -> [..., N] in ``dtype``.

    Routing in fp32 under bf16 training reads hidden states that the layer keeps in bf16 anyway: converting inside
    the operation saves the fp32 copy that autograd would otherwise hold until the backward pass. On a GPU such a
    product runs on tensor cores without a conversion: products of bf16 numbers are exact in fp32. Its backward rounds
    the gradient to bf16 first, and adds up in fp32.
    """
    if x.dtype == weight.dtype == dtype:
        with exact_dtypes(x):
            return F.linear(x, weight, bias)
    return _LinearInDtype.apply(x, weight, bias, dtype)


def _on_tensor_cores(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cuda" and x.dtype == weight.dtype and x.dtype in LOW and dtype == torch.float32


class _LinearInDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with exact_dtypes(x):
            if _on_tensor_cores(x, weight, dtype):
                result = mm_fp32(x.reshape(-1, x.shape[-1]), weight.mT)
                if bias is not None:
                    result += bias  # not in one operation: torch 2.11 fails to trace addmm with an out_dtype
                return result.view(*x.shape[:-1], len(weight))
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0).to(ctx.bias_dtype)
        with exact_dtypes(x):
            if _on_tensor_cores(x, weight, grad.dtype):
                grad_rows = grad_rows.to(x.dtype)
                if ctx.needs_input_grad[0]:
                    grad_x = (grad_rows @ weight).view(x.shape)
                if ctx.needs_input_grad[1]:
                    grad_weight = mm_fp32(grad_rows.mT, rows).to(weight.dtype)
                return grad_x, grad_weight, grad_bias, None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_rows.mT @ rows.to(grad.dtype)).to(weight.dtype)
            return grad_x, grad_weight, grad_bias, None
