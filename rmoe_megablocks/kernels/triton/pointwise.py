"""What is left of the GRU step where cuBLAS does both products: wide states, and exact fp32."""

import triton
import triton.language as tl

from rmoe_megablocks.kernels.triton.fused import gradients, sigmoid, store_gradients, tanh


@triton.jit
def _gates(a_ptr, u_ptr, b_hh_ptr, row, col, mask, P: tl.constexpr, HAS_H: tl.constexpr):
    at = row[:, None] * (3 * P) + col[None, :]
    s = tl.load(a_ptr + at, mask=mask, other=0.0)
    z = tl.load(a_ptr + at + P, mask=mask, other=0.0)
    n = tl.load(a_ptr + at + 2 * P, mask=mask, other=0.0)
    if HAS_H:
        s += tl.load(u_ptr + at, mask=mask, other=0.0)
        z += tl.load(u_ptr + at + P, mask=mask, other=0.0)
        u = tl.load(u_ptr + at + 2 * P, mask=mask, other=0.0)
    else:  # U h_0 = 0: its bias is left
        s += tl.load(b_hh_ptr + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
        z += tl.load(b_hh_ptr + P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
        u = tl.zeros_like(n) + tl.load(b_hh_ptr + 2 * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]
    s = sigmoid(s)
    return s, sigmoid(z), tanh(n + s * u), u


@triton.jit
def forward(
    a_ptr, u_ptr, h_ptr, b_hh_ptr, next_ptr, T,
    P: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_H: tl.constexpr,
):  # fmt: skip
    """a = W x + b, u = U h + b [T, 3P] in fp32, h [T, P] -> the next state [T, P]."""
    row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    for start in range(0, P, BC):
        col = start + tl.arange(0, BC)
        mask = (row[:, None] < T) & (col[None, :] < P)
        s, z, n, u = _gates(a_ptr, u_ptr, b_hh_ptr, row, col, mask, P, HAS_H)
        chunk = row[:, None] * P + col[None, :]
        following = n - z * n
        if HAS_H:
            following += z * tl.load(h_ptr + chunk, mask=mask, other=0.0).to(tl.float32)
        tl.store(next_ptr + chunk, following.to(next_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    grad_ptr, a_ptr, u_ptr, h_ptr, b_hh_ptr, buffer_ptr, grad_h_ptr, sums_ptr, T,
    P: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_H: tl.constexpr,
):  # fmt: skip
    """As the fused one: D [T, 4P], its sums [tiles, 4P], grad * z [T, P]; a and u as in :func:`forward`."""
    tile = tl.program_id(0)
    row = (tile * BT + tl.arange(0, BT)).to(tl.int64)
    for start in range(0, P, BC):
        col = start + tl.arange(0, BC)
        mask = (row[:, None] < T) & (col[None, :] < P)
        s, z, n, u = _gates(a_ptr, u_ptr, b_hh_ptr, row, col, mask, P, HAS_H)
        chunk = row[:, None] * P + col[None, :]
        grad = tl.load(grad_ptr + chunk, mask=mask, other=0.0).to(tl.float32)
        h = n
        if HAS_H:
            h = tl.load(h_ptr + chunk, mask=mask, other=0.0).to(tl.float32)
        to_n, to_s, to_z, to_ns, through_z = gradients(grad, h, s, z, n, u, HAS_H)
        store_gradients(buffer_ptr, sums_ptr, tile, row, col, mask, to_n, to_s, to_z, to_ns, P)
        if HAS_H:
            tl.store(grad_h_ptr + chunk, through_z.to(grad_h_ptr.dtype.element_ty), mask=mask)
