"""How what an MoE layer owns of its router is drawn at the start."""

import math

import torch
from torch import Tensor

INIT_METHOD, FAN_IN = LAYER_INITS = ("init_method", "fan_in")


@torch.no_grad()
def fan_in_(weight: Tensor, bias: Tensor | None = None) -> None:
    """Draws both in place from U(-1/sqrt(n), 1/sqrt(n)), n the inputs; weight [N, n], bias [N].

    torch.nn.Linear's default. For inputs of variance 1 the outputs' standard deviation is then 1/sqrt(3) whatever the
    sizes, while with N(0, std) matrices it is std * sqrt(n).
    """
    bound = 1 / math.sqrt(weight.shape[1])
    weight.uniform_(-bound, bound)
    if bias is not None:
        bias.uniform_(-bound, bound)
