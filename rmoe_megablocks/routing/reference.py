"""The recurrence as the paper writes it: unfused, one name a symbol. Every faster path is tested against it."""

import torch
from torch import Tensor


def gru_gates(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reset gate, update gate and candidate of :func:`gru_step`, each [T, P]."""
    W_s, W_z, W_n = weight_ih.chunk(3)
    U_s, U_z, U_n = weight_hh.chunk(3)
    b_ws, b_wz, b_wn = bias_ih.chunk(3)
    b_us, b_uz, b_un = bias_hh.chunk(3)
    s = torch.sigmoid(x @ W_s.T + b_ws + h @ U_s.T + b_us)
    z = torch.sigmoid(x @ W_z.T + b_wz + h @ U_z.T + b_uz)
    n = torch.tanh(x @ W_n.T + b_wn + s * (h @ U_n.T + b_un))
    return s, z, n


def gru_step(x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """One step of the GRU (Eq. 2, 3, 5): x' [T, P], h_{i-1} [T, P] -> h_i [T, P].

    The weights stack the gates in torch.nn.GRUCell's order: reset (s), update (z), candidate (n); [3P, P] and [3P].
    The paper prints one symbol for W_n and U_n, a misprint: they are two matrices.
    """
    _, z, n = gru_gates(x, h, weight_ih, weight_hh, bias_ih, bias_hh)
    return (1 - z) * n + z * h


def layerwise_logits(
    inputs: list[Tensor],
    projectors: list[tuple[Tensor, Tensor | None]],
    gru: tuple[Tensor, Tensor, Tensor, Tensor],
    routers: list[tuple[Tensor, Tensor | None]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and states of all layers for given layer inputs (Eq. 4-6), h_0 = 0.

    Args:
        inputs: x_i [T, H], one a layer.
        projectors: (weight [P, H], bias [P] or None), one a layer.
        gru: (weight_ih [3P, P], weight_hh [3P, P], bias_ih [3P], bias_hh [3P]), shared by all layers.
        routers: (weight [E, P], bias [E] or None), one a layer.

    Returns:
        logits_i [T, E] and h_i [T, P], one a layer.
    """
    h = torch.zeros_like(inputs[0] @ projectors[0][0].T)
    all_logits, all_states = [], []
    for x, (P_i, b_i), (G_i, c_i) in zip(inputs, projectors, routers, strict=True):
        projected = x @ P_i.T if b_i is None else x @ P_i.T + b_i
        h = gru_step(projected, h, *gru)
        all_logits.append(h @ G_i.T if c_i is None else h @ G_i.T + c_i)
        all_states.append(h)
    return all_logits, all_states
