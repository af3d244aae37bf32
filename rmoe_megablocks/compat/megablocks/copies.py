"""MegaBlocks' eight permutation kernels (megablocks/backend/kernels.py) in plain torch, for tensors on the CPU.

Triton needs a GPU. Arithmetic as in the kernels: multiply in fp32, round to the output dtype, then sum over top-k;
a weight's gradient is an fp32 dot product. Letters: T tokens, K top_k, N = T * K copies of tokens, E experts.

``indices`` [N] lists the copies sorted by expert, ``bin_ids`` [N] the expert of each, ``bins`` [E] where the copies
of each expert end, ``padded_bins`` [E] the same with room for padding. Copy n belongs to token n // K.
"""

import torch
from torch import Tensor


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """x [T, H] -> [N, H] sorted by expert, each row times its entry of ``weights`` [N] where given."""
    _check_matrix(x)
    _check_equal(indices.shape[0], x.shape[0] * top_k)
    return _scaled(x[indices.long() // top_k], weights, indices)


def padded_gather(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """As :func:`gather`, into [padded_bins[-1], H] with zeros between the experts."""
    out = x.new_zeros(int(padded_bins[-1]), x.shape[1])
    out[_padded_rows(bin_ids, bins, padded_bins)] = gather(x, indices, bin_ids, weights, bins, top_k)
    return out


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """x [N, H] sorted by expert -> [T, H], the sum of each token's copies times their ``weights`` [N]."""
    _check_matrix(x)
    _check_equal(indices.shape[0], x.shape[0])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[indices.long()] = _scaled(x, weights, indices)
    return _sum_copies(out, top_k)


def padded_scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """As :func:`scatter`, from [padded_bins[-1], H]."""
    _check_matrix(x)
    return scatter(x[_padded_rows(bin_ids, bins, padded_bins)], indices, bin_ids, weights, bins, top_k)


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Gradient of :func:`scatter` for its weights: x [N, H], grad [T, H] -> [N] in the dtype of ``x``."""
    _check_matrix(x)
    _check_matrix(grad)
    indices = indices.long()
    out = x.new_empty(indices.shape[0])
    out[indices] = (x.float() * grad[indices // top_k].float()).sum(-1).to(x.dtype)
    return out


def padded_scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """As :func:`scatter_wgrad` for :func:`padded_scatter`."""
    _check_matrix(x)
    return scatter_wgrad(x[_padded_rows(bin_ids, bins, padded_bins)], grad, indices, bin_ids, bins, top_k)


def binned_gather(
    x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, expert_capacity: int, top_k: int
) -> Tensor:
    """x [T, H] -> [E, expert_capacity, H]: each expert's first copies, zeros where it has fewer."""
    _check_matrix(x)
    _check_equal(indices.shape[0], x.shape[0] * top_k)
    out = x.new_zeros(bins.shape[0], expert_capacity, x.shape[1])
    kept, expert, entry = _within_capacity(indices, bins, expert_capacity)
    out[expert, entry] = _scaled(x[kept // top_k], weights, kept)
    return out


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """x [E, capacity, H] -> [T, H], the sum of each token's copies times their ``weights`` [N]; dropped ones are 0."""
    _check_equal(bins.shape[0], x.shape[0])
    out = x.new_zeros(indices.shape[0], x.shape[2])
    kept, expert, entry = _within_capacity(indices, bins, x.shape[1])
    out[kept] = _scaled(x[expert, entry], weights, kept)
    return _sum_copies(out, top_k)


def binned_scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Gradient of :func:`binned_scatter` for its weights: x [E, capacity, H], grad [T, H] -> [N], 0 if dropped."""
    _check_equal(bins.shape[0], x.shape[0])
    out = x.new_zeros(indices.shape[0])
    kept, expert, entry = _within_capacity(indices, bins, x.shape[1])
    out[kept] = (x[expert, entry].float() * grad[kept // top_k].float()).sum(-1).to(x.dtype)
    return out


def _scaled(rows: Tensor, weights: Tensor | None, indices: Tensor) -> Tensor:
    if weights is None:
        return rows
    return (rows.float() * weights[indices.long()].float()[:, None]).to(rows.dtype)


def _sum_copies(copies: Tensor, top_k: int) -> Tensor:
    return copies if top_k == 1 else copies.view(-1, top_k, copies.shape[1]).sum(1)


def _starts(bins: Tensor) -> Tensor:
    return torch.cat((bins.new_zeros(1), bins[:-1])).long()


def _padded_rows(bin_ids: Tensor, bins: Tensor, padded_bins: Tensor) -> Tensor:
    shift = _starts(padded_bins) - _starts(bins)
    return torch.arange(bin_ids.shape[0], device=bin_ids.device) + shift[bin_ids.long()]


def _within_capacity(indices: Tensor, bins: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The copies that fit, the expert of each and its place there."""
    position = torch.arange(indices.shape[0], device=indices.device)
    expert = torch.searchsorted(bins.long(), position, right=True)
    fits = expert < bins.shape[0]  # bins may cover fewer copies than there are
    position, expert = position[fits], expert[fits]
    entry = position - _starts(bins)[expert]
    fits = entry < capacity
    return indices.long()[position[fits]], expert[fits], entry[fits]


def _check_matrix(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"expected a matrix, got {x.ndim} dimensions")


def _check_equal(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"expected {expected} rows, got {found}")
