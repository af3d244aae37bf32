"""What a router needs to know, whichever host builds it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rmoe_megablocks.routing.initialisation import INIT_METHOD, LAYER_INITS

Init = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class RoutingConfig:
    """Sizes and initialisation of a router.

    Args:
        hidden_size: H, width of the hidden states.
        num_experts: E, number of logits a token gets.
        state_size: P, width of the routing state (Megatron argument ``--moe-router-rnn-hidden-size``).
        bias: whether projector and router have biases. The paper's 0.91B model has none, its small ones do.
        rnn_init: ``"standard"`` draws the recurrent cell's weights and biases from U(-1/sqrt(P), 1/sqrt(P)), as
            the 0.91B model does; ``"init_method"`` draws both by ``init_method``, as the released model code does.
        layer_init: ``"init_method"`` draws projector and router by ``init_method`` and zeroes their biases;
            ``"fan_in"`` draws both from U(-1/sqrt(n), 1/sqrt(n)), n the inputs, as torch.nn.Linear does.
        init_method: fills a weight matrix, and with the above a bias, in place; default N(0, 0.02).

    Raises:
        ValueError: a size that is no whole number of at least 1, or an unknown ``rnn_init`` or ``layer_init``.
    """

    hidden_size: int
    num_experts: int
    state_size: int = 128
    bias: bool = False
    rnn_init: str = "standard"
    layer_init: str = INIT_METHOD
    init_method: Init = partial(torch.nn.init.normal_, mean=0.0, std=0.02)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_experts", "state_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choices in (("rnn_init", RNN_INITS), ("layer_init", LAYER_INITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


RNN_INITS = ("standard", "init_method")
