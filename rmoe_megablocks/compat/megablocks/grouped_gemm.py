"""Stand-in for ``grouped_gemm``: ``backend.gmm`` and ``ops.gmm`` on torch.nn.functional.grouped_mm.

grouped_mm serves bf16 on CUDA, and fp32 and bf16 on the CPU, where it measured 0-15 % faster than a loop of matrix
products at 64 to 512 columns (twice as fast below). It wants rows of whole 16 bytes, and torch 2.10. Everything else
takes the loop: batch sizes are on the host anyway, while grouped_mm's own fallback on CUDA reads them back from the
device.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16  # bytes


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Matrix products of consecutive groups of rows (``grouped_gemm.backend.gmm``); no gradients.

    Args:
        a: [M, K], the groups one after the other.
        b: [E, K, N]; [E, N, K] with ``trans_b``; [M, N] with ``trans_a``.
        batch_sizes: int64 [E] on the CPU, rows of each group; they sum up to M.
        trans_a: multiply each group's a.T [K, rows] by its b [rows, N]: the gradient of the weights.
        trans_b: multiply by b[e].T.
        c: where the result goes, given back as well.

    Returns:
        [M, N], or [E, K, N] with ``trans_a``, where empty groups are 0. In the dtype of the operands.

    Raises:
        ValueError: operands that do not fit together.
    """
    _check(a, b, batch_sizes, trans_a, trans_b)
    a, b = a.contiguous(), b.contiguous()
    if a.shape[0] and _served(a, b):
        ends = batch_sizes.cumsum(0).to(device=a.device, dtype=torch.int32, non_blocking=True)
        out = F.grouped_mm(a.mT if trans_a else a, b.mT if trans_b else b, offs=ends)
        return out if c is None else c.copy_(out)
    if trans_a:
        shape = (batch_sizes.numel(), a.shape[1], b.shape[1])
    else:
        shape = (a.shape[0], b.shape[1 if trans_b else 2])
    out = a.new_empty(shape) if c is None else c
    sizes = batch_sizes.tolist()
    b_groups, out_groups = (b.split(sizes), out) if trans_a else (b, out.split(sizes))
    for a_group, b_group, out_group in zip(a.split(sizes), b_groups, out_groups, strict=True):
        torch.mm(a_group.mT if trans_a else a_group, b_group.mT if trans_b else b_group, out=out_group)
    return out


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, batch_sizes, trans_b):
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return gmm(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx, grad):
        a, b, batch_sizes = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = gmm(grad, b, batch_sizes, trans_b=not ctx.trans_b)
        if ctx.needs_input_grad[1]:
            left, right = (grad, a) if ctx.trans_b else (a, grad)
            grad_b = gmm(left, right, batch_sizes, trans_a=True)
        return grad_a, grad_b, None, None


def gmm_with_gradients(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """:func:`gmm` with gradients for a [M, K] and b [E, K, N] or [E, N, K] (``grouped_gemm.ops.gmm``)."""
    return _GroupedGemm.apply(a, b, batch_sizes, trans_b)


def _served(a: Tensor, b: Tensor) -> bool:
    """Whether grouped_mm is there and takes these operands, and without reading the device back."""
    if not hasattr(F, "grouped_mm"):
        return False
    dtypes = (torch.bfloat16,) if a.device.type == "cuda" else (torch.float32, torch.bfloat16)
    return a.dtype in dtypes and all(
        operand.shape[-1] * operand.itemsize % _ALIGNMENT == 0 and operand.data_ptr() % _ALIGNMENT == 0
        for operand in (a, b)
    )


def _check(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    def refuse(reason: str) -> None:
        shapes = f"a {list(a.shape)}, b {list(b.shape)}, batch_sizes {list(batch_sizes.shape)}"
        raise ValueError(f"grouped gemm: {reason} ({shapes}, trans_a={trans_a}, trans_b={trans_b})")

    if trans_a and trans_b:
        refuse("only one operand can be transposed")
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64 or batch_sizes.ndim != 1:
        refuse("batch_sizes must be an int64 vector on the CPU")
    if a.ndim != 2 or b.ndim != (2 if trans_a else 3):
        refuse("wrong number of dimensions")
    if a.dtype != b.dtype:
        refuse(f"a is {a.dtype}, b is {b.dtype}")
    if (a.shape[0] != b.shape[0]) if trans_a else (a.shape[1] != b.shape[2 if trans_b else 1]):
        refuse("inner dimensions differ")
    if not trans_a and b.shape[0] != batch_sizes.numel():
        refuse("one matrix a group is needed")
    if int(batch_sizes.sum()) != a.shape[0]:
        refuse(f"batch_sizes sum up to {int(batch_sizes.sum())}")


backend = SimpleNamespace(gmm=gmm)
ops = SimpleNamespace(gmm=gmm_with_gradients)
