"""Stand-in for ``megablocks_ops``: the seven operations of MegaBlocks' csrc/ in plain torch, for CPU and CUDA tensors.

Same names, arguments, shapes and dtypes as the compiled module; none of them reads a value back to the host. As
there, results go to ``out`` arguments and nothing has a gradient.
"""

import torch
from torch import Tensor

_BITS = {torch.int16: 16, torch.int32: 32, torch.int64: 64}


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Stable ascending sort of x [N] by its bits [0, end_bit): x_out gets the values, iota_out where they were.

    Args:
        x: int16, int32 or int64.
        end_bit: number of low bits that count. Only all bits of the dtype include the sign.
        x_out, iota_out: [N], dtype of ``x``.
    """
    _check(x, 1, "x")
    keys = x if end_bit >= _BITS[x.dtype] else x & ((1 << end_bit) - 1)
    order = keys.argsort(stable=True)
    torch.index_select(x, 0, order, out=x_out)
    iota_out.copy_(order)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """How often each of 0 .. num_bins - 1 is in x: [N] -> int32 [num_bins], [B, N] -> int32 [B, num_bins].

    Values outside that range are not counted.
    """
    if x.ndim not in (1, 2):
        raise ValueError(f"histogram: x must have 1 or 2 dimensions, got {x.ndim}")
    rows = torch.atleast_2d(x).long()
    outside = (rows < 0) | (rows >= num_bins)
    counts = torch.zeros(rows.shape[0], num_bins + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, rows.masked_fill(outside, num_bins), torch.ones_like(rows, dtype=torch.int32))
    return counts[:, :num_bins].reshape(*x.shape[:-1], num_bins)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """out[b, i] = x[b, 0] + .. + x[b, i]; both [B, N] of one integer dtype, dim 1."""
    _check(x, 2, "x")
    _check_dim(dim)
    out.copy_(torch.cumsum(x, 1, dtype=x.dtype))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """out[b, i] = x[b, 0] + .. + x[b, i - 1]; both [B, N] of one integer dtype, dim 1."""
    _check(x, 2, "x")
    _check_dim(dim)
    out.copy_(torch.cumsum(x, 1, dtype=x.dtype) - x)


def indices(padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """Block columns of the block-sparse MLP: a row of blocks in bin e gets e * block_columns + 0 .. block_columns - 1.

    Args:
        padded_bins: int32 [E], ends of the bins in rows, multiples of ``block_size``.
        out: int16 [block_rows * block_columns].
    """
    rows = torch.arange(block_rows, device=padded_bins.device, dtype=padded_bins.dtype) * block_size
    bins = torch.searchsorted(padded_bins, rows, right=True)
    columns = torch.arange(block_columns, device=padded_bins.device)
    out.copy_((bins[:, None] * block_columns + columns).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """out[b, bins[i - 1]:bins[i]] = x[b, i]; x [B, N], bins int32 [N], out [B, M] with M = bins[-1]."""
    if out.numel():
        bin_of = _bin_of_column(bins, out.shape[1]).clamp_(max=bins.numel() - 1)
        torch.index_select(x, 1, bin_of, out=out)


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """out[b, i] = sum of grad[b, bins[i - 1]:bins[i]], summed in fp32; grad [B, M], bins int32 [N], out [B, N]."""
    sums = torch.zeros(grad.shape[0], bins.numel() + 1, dtype=torch.float32, device=grad.device)
    sums.index_add_(1, _bin_of_column(bins, grad.shape[1]), grad.float())
    out.copy_(sums[:, :-1])


def _bin_of_column(bins: Tensor, columns: int) -> Tensor:
    return torch.searchsorted(bins, torch.arange(columns, device=bins.device, dtype=bins.dtype), right=True)


def _check(x: Tensor, dimensions: int, name: str) -> None:
    if x.ndim != dimensions or x.dtype not in _BITS:
        raise ValueError(f"{name} must be int16, int32 or int64 of {dimensions} dimensions, got {x.dtype} {x.ndim}")


def _check_dim(dim: int) -> None:
    if dim != 1:
        raise ValueError(f"sums run along dimension 1 only, got {dim}")
