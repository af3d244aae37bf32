"""The routing step on tensors: Triton's kernels and the plain products around them.

Operands of a product are x, h and the matrices of one dtype, or fp32 x and h with matrices in bf16 ("split"): an fp32
value is then the sum of two bf16 ones, to 2^-17 of it, and the gates' gradients are rounded to bf16 before their
products, which are added up in fp32, as for every other weight of a bf16 model.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from rmoe_megablocks.kernels import gru_arithmetic
from rmoe_megablocks.kernels.gru_arithmetic import Gradients
from rmoe_megablocks.kernels.products import LOW, addmm_fp32, mm_fp32
from rmoe_megablocks.kernels.triton import fused, pointwise
from rmoe_megablocks.kernels.triton.tables import (
    BACKWARD,
    POINTWISE,
    Tile,
    forward_tile,
    is_fused,
    logits_fused,
    padded,
)

Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor, h: Tensor | None, weights: Weights, router: Tensor | None, router_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The next state and the logits.

    Args:
        x, h: [T, P] contiguous, h None for h_0 = 0.
        weights: GRUCell's; the matrices in the dtype of the products, which is x's or, of an fp32 x, bf16.
        router, router_bias: [E, P] and [E] or None, in the matrices' dtype; None for no logits.

    Returns:
        h' [T, P] and logits [T, E] (None without a router) in the dtype of x.
    """
    T, size = x.shape
    split = x.dtype != weights[0].dtype
    low = weights[0].dtype in LOW
    following = torch.empty_like(x)
    if not is_fused(size, low):
        pre = _preactivations(x, h, weights)
        if T:
            columns = min(POINTWISE.columns, padded(size))
            pointwise.forward[_tiles(T, POINTWISE)](
                *pre, h, weights[3], following, T, size, POINTWISE.rows, columns, h is not None, **_options(POINTWISE)
            )
        return following, _logits(following, router, router_bias)
    has_logits = router is not None and logits_fused(size, len(router), low)
    experts = len(router) if has_logits else 16
    logits = x.new_empty(T, experts) if has_logits else None
    if T:
        padded_size, tile = padded(size), forward_tile(_major(x.device))
        fused.forward[_tiles(T, tile)](
            x, h, *weights, router, router_bias, following, logits, T, size, experts,
            padded_size, padded(experts), tile.rows, min(tile.columns, padded_size),
            h is not None, has_logits, router_bias is not None, split, **_options(tile),
        )  # fmt: skip
    return following, logits if has_logits else _logits(following, router, router_bias)


def backward(grad: Tensor, x: Tensor, h: Tensor | None, weights: Weights) -> Gradients:
    """Gradients of x, h (None without), weight_ih, weight_hh, bias_ih, bias_hh from that of the next state.

    Args:
        grad: [T, P] contiguous, in the dtype of the state.
        x, h, weights: as of :func:`forward`.

    Returns:
        In the dtype of ``grad``, the parameters' alike.
    """
    (T, size), operands = grad.shape, weights[0].dtype
    split, fuse = x.dtype != operands, is_fused(size, operands in LOW)
    tile = BACKWARD if fuse else POINTWISE
    (tiles,) = _tiles(T, tile)
    buffer = grad.new_empty(T, 4 * size, dtype=operands)
    sums = grad.new_empty(tiles, 4 * size, dtype=torch.float32)
    grad_h = None if h is None else torch.empty_like(grad)
    columns = min(tile.columns, padded(size))
    copies = [torch.empty_like(v, dtype=operands) if split and v is not None else None for v in (x, h)]
    if T and fuse:
        fused.backward[(tiles,)](
            grad, x, h, *weights, buffer, grad_h, sums, *copies, T, size, padded(size), tile.rows, columns,
            h is not None, split, **_options(tile),
        )  # fmt: skip
    elif T:
        for copy, value in zip(copies, (x, h), strict=True):
            if copy is not None:
                copy.copy_(value)
        pointwise.backward[(tiles,)](
            grad, *_preactivations(x, h, weights), h, weights[3], buffer, grad_h, sums, T, size, tile.rows, columns,
            h is not None, **_options(tile),
        )  # fmt: skip
    products = _products_fp32 if split else gru_arithmetic.products
    grads = products(buffer, *(copies if split else (x, h)), grad_h, *weights[:2])
    return *grads, *gru_arithmetic.bias_sums(sums.sum(0).to(grad.dtype))


def _products_fp32(buffer: Tensor, x: Tensor, h: Tensor | None, grad_h: Tensor | None, w_ih: Tensor, w_hh: Tensor):
    """:func:`.gru_arithmetic.products` of bf16 operands with fp32 results."""
    size = w_hh.shape[1]
    to_ih, to_hh = buffer[:, : 3 * size], buffer[:, size:]
    grad_x = mm_fp32(to_ih, w_ih.roll(size, 0))
    grad_w_ih = mm_fp32(to_ih.mT, x).roll(-size, 0)
    if h is None:
        return grad_x, None, grad_w_ih, torch.zeros_like(w_hh, dtype=torch.float32)
    return grad_x, addmm_fp32(grad_h, to_hh, w_hh), grad_w_ih, mm_fp32(to_hh.mT, h)


def _preactivations(x: Tensor, h: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """W x + b, U h + b [T, 3P] in fp32, the second None without h."""
    w_ih, w_hh, b_ih, b_hh = weights
    return _affine(x, w_ih, b_ih), None if h is None else _affine(h, w_hh, b_hh)


def _affine(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    high = v.to(weight.dtype)
    total = addmm_fp32(bias.float(), high, weight.mT)
    if v.dtype != weight.dtype:  # what bf16 leaves of fp32, in a second product
        total = addmm_fp32(total, (v - high.float()).to(weight.dtype), weight.mT)
    return total


def _logits(h: Tensor, router: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What the fused kernel has no registers for: W h + b in the dtype of h."""
    if router is None:
        return None
    return _affine(h, router, h.new_zeros(len(router)) if bias is None else bias).to(h.dtype)


@functools.cache
def _major(device: torch.device) -> int:
    """First digit of the compute capability; of the interpreter, which has none, the newest with a table."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _tiles(T: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(T, tile.rows),)


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}
