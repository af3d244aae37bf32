"""One GRU step in one kernel: both products, gates, next state, logits; and its backward up to the gates' gradients.

A program has all P columns of a tile of tokens and goes over the gates in chunks of columns; the weights come from
the L2 cache. Weights are [3P, P] as GRUCell's, gates in the order s, z, n. Nothing is added atomically.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(v):
    """tanh in fp32: by exp, and by its series near 0, where 1 - exp(-2v) loses what is left of v."""
    t = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - t) / (1.0 + t)
    q = v * v
    near = v * (1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0)))))
    return tl.where(q < 0.0625, near, tl.where(v < 0.0, -far, far))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _weights(w_ptr, gate: tl.constexpr, k, col, P: tl.constexpr):
    """The chunk ``col`` of one gate's matrix, transposed: [BP, BC]."""
    mask = (k[:, None] < P) & (col[None, :] < P)
    return tl.load(w_ptr + gate * P * P + col[None, :] * P + k[:, None], mask=mask, other=0.0)


@triton.jit
def _bias(b_ptr, gate: tl.constexpr, col, P: tl.constexpr):
    return tl.load(b_ptr + gate * P + col, mask=col < P, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product(high, low, w, total, SPLIT: tl.constexpr):
    """total + v w, with v in one part, or as the sum of two bf16 parts that hold what fp32 holds to 2e-6."""
    total = tl.dot(high, w, total)
    if SPLIT:
        total = tl.dot(low, w, total)
    return total


@triton.jit
def _parts(tile_ptr, mask, w_ptr, SPLIT: tl.constexpr):
    """A tile in the weights' dtype, and what that leaves of fp32 (with SPLIT)."""
    v = tl.load(tile_ptr, mask=mask, other=0.0)
    high = v.to(w_ptr.dtype.element_ty)
    low = high
    if SPLIT:
        low = (v - high.to(tl.float32)).to(w_ptr.dtype.element_ty)
    return high, low


@triton.jit
def _preactivations(
    x_high, x_low, h_high, h_low, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, k, col,
    P: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of the gates s and z, W_n x + b and U_n h + b, all [BT, BC]."""
    s = tl.zeros((BT, BC), dtype=tl.float32) + (_bias(b_ih_ptr, 0, col, P) + _bias(b_hh_ptr, 0, col, P))
    z = tl.zeros((BT, BC), dtype=tl.float32) + (_bias(b_ih_ptr, 1, col, P) + _bias(b_hh_ptr, 1, col, P))
    n = tl.zeros((BT, BC), dtype=tl.float32) + _bias(b_ih_ptr, 2, col, P)
    u = tl.zeros((BT, BC), dtype=tl.float32) + _bias(b_hh_ptr, 2, col, P)
    s = _product(x_high, x_low, _weights(w_ih_ptr, 0, k, col, P), s, SPLIT)
    z = _product(x_high, x_low, _weights(w_ih_ptr, 1, k, col, P), z, SPLIT)
    n = _product(x_high, x_low, _weights(w_ih_ptr, 2, k, col, P), n, SPLIT)
    if HAS_H:
        s = _product(h_high, h_low, _weights(w_hh_ptr, 0, k, col, P), s, SPLIT)
        z = _product(h_high, h_low, _weights(w_hh_ptr, 1, k, col, P), z, SPLIT)
        u = _product(h_high, h_low, _weights(w_hh_ptr, 2, k, col, P), u, SPLIT)
    return s, z, n, u


@triton.jit
def forward(
    x_ptr, h_ptr, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, router_ptr, router_bias_ptr,
    next_ptr, logits_ptr, T,
    P: tl.constexpr, E: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_H: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x, h [T, P] -> next [T, P], logits [T, E]. SPLIT: x and h in fp32 over bf16 weights."""
    row = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    k = tl.arange(0, BP)
    tile = row[:, None] * P + k[None, :]
    tile_mask = (row[:, None] < T) & (k[None, :] < P)
    w_type = w_ih_ptr.dtype.element_ty

    x_high, x_low = _parts(x_ptr + tile, tile_mask, w_ih_ptr, SPLIT)
    h_high, h_low = x_high, x_low
    if HAS_H:
        h_high, h_low = _parts(h_ptr + tile, tile_mask, w_ih_ptr, SPLIT)

    e = tl.arange(0, BE)
    logits = tl.zeros((BT, BE), dtype=tl.float32)
    for start in range(0, BP, BC):
        col = start + tl.arange(0, BC)
        s, z, n, u = _preactivations(
            x_high, x_low, h_high, h_low, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, k, col, P, BT, BC, HAS_H, SPLIT
        )
        z = sigmoid(z)
        n = tanh(n + sigmoid(s) * u)

        chunk = row[:, None] * P + col[None, :]
        chunk_mask = (row[:, None] < T) & (col[None, :] < P)
        following = n - z * n
        if HAS_H:
            following += z * tl.load(h_ptr + chunk, mask=chunk_mask, other=0.0).to(tl.float32)
        rounded = following.to(next_ptr.dtype.element_ty)  # what the next layer reads, and the router matrix
        tl.store(next_ptr + chunk, rounded, mask=chunk_mask)
        if HAS_LOGITS:
            router_mask = (e[None, :] < E) & (col[:, None] < P)
            router = tl.load(router_ptr + e[None, :] * P + col[:, None], mask=router_mask, other=0.0)
            high = rounded.to(w_type)
            low = high
            if SPLIT:
                low = (following - high.to(tl.float32)).to(w_type)
            logits = _product(high, low, router, logits, SPLIT)
    if HAS_LOGITS:
        if HAS_ROUTER_BIAS:
            logits += tl.load(router_bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        logits_mask = (row[:, None] < T) & (e[None, :] < E)
        tl.store(logits_ptr + row[:, None] * E + e[None, :], logits.to(logits_ptr.dtype.element_ty), mask=logits_mask)


@triton.jit
def gradients(grad, h, s, z, n, u, HAS_H: tl.constexpr):
    """Gradients of n, s, z and s * n's recurrent part, from that of the next state; all fp32, of one shape."""
    through_z = grad * z
    to_n = (grad - through_z) * (1.0 - n * n)
    to_ns = to_n * s
    to_s = to_ns * u * (1.0 - s)
    difference = -n
    if HAS_H:
        difference = h - n
    to_z = through_z * difference * (1.0 - z)
    return to_n, to_s, to_z, to_ns, through_z


@triton.jit
def store_gradients(
    buffer_ptr, sums_ptr, tile, row, col, mask, to_n, to_s, to_z, to_ns, P: tl.constexpr
):  # fmt: skip
    """Four columns of D [T, 4P] = (n | s | z | ns) and their sums over this program's tokens [tiles, 4P]."""
    at = buffer_ptr + row[:, None] * (4 * P) + col[None, :]
    kind = buffer_ptr.dtype.element_ty
    tl.store(at, to_n.to(kind), mask=mask)
    tl.store(at + P, to_s.to(kind), mask=mask)
    tl.store(at + 2 * P, to_z.to(kind), mask=mask)
    tl.store(at + 3 * P, to_ns.to(kind), mask=mask)
    sums = sums_ptr + tile.to(tl.int64) * (4 * P) + col
    # rows behind the last token have a gradient of 0
    tl.store(sums, tl.sum(to_n, 0), mask=col < P)
    tl.store(sums + P, tl.sum(to_s, 0), mask=col < P)
    tl.store(sums + 2 * P, tl.sum(to_z, 0), mask=col < P)
    tl.store(sums + 3 * P, tl.sum(to_ns, 0), mask=col < P)


@triton.jit
def backward(
    grad_ptr, x_ptr, h_ptr, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr,
    buffer_ptr, grad_h_ptr, sums_ptr, x_copy_ptr, h_copy_ptr, T,
    P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """D [T, 4P], its sums [tiles, 4P], grad * z [T, P]; with SPLIT also x and h in the weights' dtype [T, P].

    The gates are those of :func:`forward` again, split alike: from x and h rounded to bf16, gates with large weights
    would be others than those that were passed on.
    """
    tile_index = tl.program_id(0)
    row = (tile_index * BT + tl.arange(0, BT)).to(tl.int64)
    k = tl.arange(0, BP)
    tile = row[:, None] * P + k[None, :]
    tile_mask = (row[:, None] < T) & (k[None, :] < P)
    x_high, x_low = _parts(x_ptr + tile, tile_mask, w_ih_ptr, SPLIT)
    h_high, h_low = x_high, x_low
    if HAS_H:
        h_high, h_low = _parts(h_ptr + tile, tile_mask, w_ih_ptr, SPLIT)
    if SPLIT:
        tl.store(x_copy_ptr + tile, x_high, mask=tile_mask)
        if HAS_H:
            tl.store(h_copy_ptr + tile, h_high, mask=tile_mask)

    for start in range(0, BP, BC):
        col = start + tl.arange(0, BC)
        s, z, n, u = _preactivations(
            x_high, x_low, h_high, h_low, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, k, col, P, BT, BC, HAS_H, SPLIT
        )
        s = sigmoid(s)
        z = sigmoid(z)
        n = tanh(n + s * u)

        chunk = row[:, None] * P + col[None, :]
        mask = (row[:, None] < T) & (col[None, :] < P)
        grad = tl.load(grad_ptr + chunk, mask=mask, other=0.0).to(tl.float32)
        h_chunk = n
        if HAS_H:
            h_chunk = tl.load(h_ptr + chunk, mask=mask, other=0.0).to(tl.float32)
        to_n, to_s, to_z, to_ns, through_z = gradients(grad, h_chunk, s, z, n, u, HAS_H)
        store_gradients(buffer_ptr, sums_ptr, tile_index, row, col, mask, to_n, to_s, to_z, to_ns, P)
        if HAS_H:
            tl.store(grad_h_ptr + chunk, through_z.to(grad_h_ptr.dtype.element_ty), mask=mask)
