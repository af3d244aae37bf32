"""How what an MoE layer owns of its router is drawn at the start."""

import math

import torch
from torch import Tensor

from rmoe_megablocks.routing.arguments import Argument
from rmoe_megablocks.routing.config import RoutingConfig

INIT_METHOD, FAN_IN = LAYER_INITS = ("init_method", "fan_in")
INIT = Argument(
    "--moe-router-init",
    INIT_METHOD,
    "Initialisation of what each layer owns of its router, as gru's projector and router matrix or the linear "
    "router's matrix. init_method (the default): the model's own, as the paper's 0.91B run; gru's biases are 0. "
    "fan_in: uniform in +-1/sqrt(inputs), biases too, which is torch.nn.Linear's and the paper's small models'. "
    "With init_method a gru router's logits shrink with hidden size and P: at small sizes its gates start flat.",
    choices=LAYER_INITS,
    kept=False,
)


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


@torch.no_grad()
def draw(config: RoutingConfig, weight: Tensor, bias: Tensor | None = None) -> None:
    """Draws a matrix [N, n] and its bias [N] in place by ``--moe-router-init``."""
    if config[INIT] == FAN_IN:
        fan_in_(weight, bias)
        return
    config.init_method(weight)
    if bias is not None:
        bias.zero_()
