"""Every router type as papers and published code define it: a few lines each, sharing no code with the package.

``DEFINED[name](w, s, x, h) -> logits [T, E], state``: ``w`` and ``s`` are a layer's and the shared parameters by name,
x [T, H] the hidden states, h the previous layer's state or None for zeros. A type that is registered needs its
definition here, and its parameters in the paper's medium model.
"""

import math

import pytest
import torch
from torch import Tensor, nn

TAU = 0.3  # xmoe's temperature, a fixed number

Parameters = dict[str, Tensor]


def gelu(v: Tensor) -> Tensor:
    return 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))


def unit(v: Tensor) -> Tensor:
    return v / v.square().sum(-1, keepdim=True).sqrt()


def softmax(v: Tensor) -> Tensor:
    return v.exp() / v.exp().sum(-1, keepdim=True)


def cosine_head(w: Parameters, v: Tensor) -> Tensor:
    """cos(v, e_i) / tau, and 1 / tau = exp(log_scale)."""
    return unit(v) @ unit(w["embeddings"]).T * w["log_scale"].exp()


def xmoe_head(w: Parameters, v: Tensor) -> Tensor:
    """(W v) . e_i / |e_i| / tau."""
    return v @ w["projection"].T @ unit(w["embeddings"]).T / TAU


def product_key_head(w: Parameters, v: Tensor) -> Tensor:
    """Of expert n i + j: (W_a v)_i + (W_b v)_j."""
    n = len(w["rows"])
    a, b = v @ w["rows"].T, v @ w["columns"].T
    return torch.stack([a[:, i] + b[:, j] for i in range(n) for j in range(n)], dim=-1)


HEADS = {"cosine": cosine_head, "xmoe": xmoe_head, "product_key": product_key_head}


def stateless(head):
    """A head on the hidden states."""
    return lambda w, s, x, h: (head({name.removeprefix("reader."): p for name, p in w.items()}, x), None)


def mlp(w, s, x, h):
    return gelu(x @ w["fc1"].T + w["fc1_bias"]) @ w["fc2"].T + w["fc2_bias"], None


def random(w, s, x, h):
    return x @ w["weight"].T, None


def hyper(w, s, x, h):
    hidden = torch.clamp(w["fc1"] @ w["embedding"][0] + w["fc1_bias"], min=0)
    matrix = (w["fc2"] @ hidden + w["fc2_bias"]).reshape(-1, x.shape[-1] + 1)
    return x @ matrix[:, :-1].T + matrix[:, -1], None


def omni(w, s, x, h):
    return x @ s["weight"].T, None


def read(w: Parameters, v: Tensor) -> Tensor:
    """Logits of a recurrent router: its matrix, or whichever head its parameters are."""
    if "router" in w:
        return v @ w["router"].T + w.get("router_bias", 0)
    head = {name.removeprefix("head."): p for name, p in w.items() if name.startswith("head.")}
    (name,) = (kind for kind, own in HEAD_PARAMETERS.items() if own == head.keys())
    return HEADS[name](head, v)


HEAD_PARAMETERS = {
    "cosine": {"embeddings", "log_scale"},
    "xmoe": {"projection", "embeddings"},
    "product_key": {"rows", "columns"},
}


def recurrent(cell: type[nn.RNNCellBase]):
    """torch's own cell, on the projected hidden states."""

    def define(w, s, x, h):
        size = len(w["projector"])
        projected = x @ w["projector"].T + w.get("projector_bias", 0)
        h = x.new_zeros(len(x), size * (2 if cell is nn.LSTMCell else 1)) if h is None else h
        state = h.split(size, dim=-1) if cell is nn.LSTMCell else h
        state = torch.func.functional_call(cell(size, size, dtype=x.dtype), s, (projected, state))
        if cell is nn.LSTMCell:
            return read(w, state[0]), torch.cat(state, dim=-1)
        return read(w, state), state

    return define


def eda(w, s, x, h):
    r = x @ w["projector"].T + w["projector_bias"] + (0 if h is None else w["gamma"] * h)
    v = w["norm"] * r / (r.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    v = gelu(v @ w["fc1"].T + w["fc1_bias"])
    v = gelu(v @ w["fc2"].T + w["fc2_bias"])
    return v @ w["router"].T, r


DEFINED = {
    **{name: stateless(head) for name, head in HEADS.items()},
    "mlp": mlp,
    "random": random,
    "hyper": hyper,
    "omni": omni,
    "gru": recurrent(nn.GRUCell),
    "rnn": recurrent(nn.RNNCell),
    "lstm": recurrent(nn.LSTMCell),
    "eda": eda,
}

H, E, P = 352, 16, 128
#: parameters of one layer and of what is shared, in the paper's medium model
COUNTS = {
    "mlp": (H * 256 + 256 + 256 * E + E, 0),
    "random": (H * E, 0),
    "hyper": (352 * 256 + 256 + 256 * 5648 + 5648 + H, 0),
    "cosine": (H * E + 1, 0),
    "xmoe": (16 * (H + E), 0),
    "product_key": (2 * 4 * H, 0),
    "omni": (0, H * E),
    "gru": (P * (H + E), 6 * P * P + 6 * P),
    "rnn": (P * (H + E), 2 * P * P + 2 * P),
    "lstm": (P * (H + E), 8 * P * P + 8 * P),
    "eda": (P * (H + E) + 2 * P * P + 5 * P, 0),
}


def of_type(table: dict, kind: str):
    """The entry of a type; fails the test that asks for a type without one."""
    if kind not in table:
        pytest.fail(f"router type {kind!r} has no definition: write its equations into {__name__} and count it there")
    return table[kind]
