"""Forward and backward of one GRU step in plain torch, without autograd: what every form but Triton's computes with.

The gradient of all four blocks of pre-activations is one buffer D [T, 4P] with the columns (n | s | z | n * s): the
first three blocks belong to weight_ih (whose rows are s, z, n), the last three to weight_hh in its own order. No block
is copied, and one column sum holds both biases' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Rows whose work stays in a core's cache, between 256 and 512 alike where it was measured.
_CPU_ROWS = 256

Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor, h: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The next state and what its gradient needs.

    Args:
        x, h: [..., P], of one dtype with the parameters; h None for h_0 = 0.
        weight_ih, weight_hh, bias_ih, bias_hh: GRUCell's, [3P, P] and [3P].

    Returns:
        The state [..., P]; the gates s, z, n [T, 3P]; U_n h with its bias [T, P], of no rows where h is None.
    """
    size = weight_hh.shape[1]
    shape, x = x.shape, x.reshape(-1, size)
    h = None if h is None else h.reshape(-1, size)
    gates = x.new_empty(len(x), 3 * size)
    recurrent_n = x.new_empty(0 if h is None else len(x), size)
    following = torch.empty_like(x)
    with exact_dtypes(x):
        bias = bias_ih.clone()
        bias[: 2 * size] += bias_hh[: 2 * size]
        recurrent_sz, recurrent = weight_hh[: 2 * size].mT, weight_hh[2 * size :].mT
        for rows in _blocks(x):
            s, z, n = (kept := gates[rows]).split(size, dim=-1)
            torch.addmm(bias, x[rows], weight_ih.mT, out=kept)
            if h is None:  # U h_0 = 0: only its bias is left
                kept_n = bias_hh[2 * size :]
            else:  # added where the other product lies: no second [T, 3P] that is written and read again
                torch.addmm(kept[:, : 2 * size], h[rows], recurrent_sz, out=kept[:, : 2 * size])
                kept_n = torch.addmm(bias_hh[2 * size :], h[rows], recurrent, out=recurrent_n[rows])
            kept[:, : 2 * size].sigmoid_()
            n.addcmul_(s, kept_n).tanh_()
            if h is None:
                torch.addcmul(n, z, n, value=-1, out=following[rows])
            else:
                torch.lerp(n, h[rows], z, out=following[rows])
    return following.view(shape), gates, recurrent_n


def backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor | None,
    gates: Tensor | None,
    recurrent_n: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> Gradients:
    """Gradients of :func:`forward`'s six arguments; of h None where h is None, of weight_hh zeros there.

    Args:
        grad: of the state, [..., P].
        gates, recurrent_n: what :func:`forward` returned, or None: they are computed again, block by block.
        bias_ih, bias_hh: read where gates are None; bias_hh also where h is.
    """
    size = weight_hh.shape[1]
    shape, x, grad = x.shape, x.reshape(-1, size), grad.reshape(-1, size)
    h = None if h is None else h.reshape(-1, size)
    buffer = grad.new_empty(len(x), 4 * size)
    grad_x = torch.empty_like(grad)
    grad_h = torch.empty_like(grad)  # the part that does not pass through weight_hh, at first
    with exact_dtypes(x):
        rolled = weight_ih.roll(size, 0)
        for rows in _blocks(x):
            h_rows = None if h is None else h[rows]
            if gates is None:
                _, kept, kept_n = forward(x[rows], h_rows, weight_ih, weight_hh, bias_ih, bias_hh)
            else:
                kept, kept_n = gates[rows], recurrent_n[rows]
            _pointwise(
                grad[rows], h_rows, kept, bias_hh[2 * size :] if h is None else kept_n, buffer[rows], grad_h[rows]
            )
            # while D's rows are in the cache; weights' gradients are not added up over blocks, which bf16 would round
            _to_inputs(buffer[rows], None if h is None else weight_hh, rolled, grad_x[rows], grad_h[rows])
        weights, biases = _to_weights(buffer, x, h, weight_hh), bias_sums(buffer.sum(0))
        return grad_x.view(shape), None if h is None else grad_h.view(shape), *weights, *biases


def products(buffer: Tensor, x: Tensor, h: Tensor | None, grad_h: Tensor, weight_ih: Tensor, weight_hh: Tensor):
    """Gradients of x, h (added to ``grad_h`` in place), weight_ih, weight_hh from D [T, 4P]; x, h [T, P]."""
    grad_x, rolled = torch.empty_like(x), weight_ih.roll(weight_hh.shape[1], 0)
    _to_inputs(buffer, None if h is None else weight_hh, rolled, grad_x, grad_h)
    return grad_x, None if h is None else grad_h, *_to_weights(buffer, x, h, weight_hh)


def _to_inputs(buffer: Tensor, weight_hh: Tensor | None, rolled_ih: Tensor, grad_x: Tensor, grad_h: Tensor) -> None:
    """Fills ``grad_x`` and adds to ``grad_h``, unless weight_hh is None; ``rolled_ih`` has weight_ih's rows as D's."""
    size = grad_x.shape[1]
    torch.mm(buffer[:, : 3 * size], rolled_ih, out=grad_x)
    if weight_hh is not None:
        torch.addmm(grad_h, buffer[:, size:], weight_hh, out=grad_h)  # addmm_ is left out by torch's counter


def _to_weights(buffer: Tensor, x: Tensor, h: Tensor | None, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    size = weight_hh.shape[1]
    grad_weight_ih = (buffer[:, : 3 * size].mT @ x).roll(-size, 0)
    if h is None:
        # Zeros rather than None: a stage whose only MoE layer is the model's first must still report a
        # gradient of weight_hh, or Megatron's overlapped gradient reduction waits for it for ever.
        return grad_weight_ih, torch.zeros_like(weight_hh)
    return grad_weight_ih, buffer[:, size:].mT @ h


def bias_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of bias_ih and bias_hh [3P] from the column sums of D [4P]."""
    size = len(sums) // 4
    return sums[: 3 * size].roll(-size, 0), sums[size:].clone()


def _pointwise(
    grad: Tensor, h: Tensor | None, gates: Tensor, recurrent_n: Tensor, buffer: Tensor, grad_h: Tensor
) -> None:
    """Fills rows of D and grad' * z. h' = n + z (h - n); tanh' = 1 - n^2; sigmoid' = s (1 - s)."""
    size = grad.shape[1]
    s, z, n = gates.split(size, dim=-1)
    to_n, to_s, to_z, to_ns = buffer.split(size, dim=-1)
    torch.mul(grad, z, out=grad_h)
    rest = grad - grad_h
    torch.addcmul(rest, rest * n, n, value=-1, out=to_n)
    rest = n.neg() if h is None else h - n
    rest *= grad_h
    torch.addcmul(rest, rest, z, value=-1, out=to_z)
    torch.mul(to_n, s, out=to_ns)
    torch.mul(to_ns, recurrent_n, out=rest)
    torch.addcmul(rest, rest, s, value=-1, out=to_s)


def _blocks(x: Tensor) -> Iterator[slice]:
    step = _CPU_ROWS if x.device.type == "cpu" else max(len(x), 1)
    return (slice(start, start + step) for start in range(0, len(x), step))


def exact_dtypes(x: Tensor) -> AbstractContextManager:
    """No autocast inside: the caller's dtypes are those of the arithmetic."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
