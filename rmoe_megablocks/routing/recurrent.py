"""Routers around a recurrence that all layers share: projector (Eq. 4), cell (Eq. 5), head (Eq. 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.arguments import Argument, at_least
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.heads import HEADS, TEMPERATURE, XMOE_SIZE, check_head
from rmoe_megablocks.routing.layer import RECURRENCE, RouterLayer
from rmoe_megablocks.routing.shared import SharedRouting

STATE_SIZE = Argument(
    "--moe-router-rnn-hidden-size",
    128,
    "Width of the routing state that a recurrent router hands from layer to layer.",
    check=at_least(1),
    metavar="P",
)
BIAS = Argument(
    "--moe-router-rnn-bias",
    False,
    "Biases in a recurrent router's projectors and router matrices.",
)
RNN_INIT = Argument(
    "--moe-router-rnn-init",
    "standard",
    "Initialisation of the recurrent cell, weights and biases alike: uniform in +-1/sqrt(P), which is torch's and the "
    "0.91B run's, or the model's own (--init-method-std), which is the released code's.",
    choices=("standard", "init_method"),
    kept=False,
)
HEAD = Argument(
    "--moe-router-head",
    "linear",
    "What reads a recurrent router's state: a matrix as in RMoE, or the head of cosine, xmoe or product_key.",
    choices=tuple(HEADS),
)


class SharedCell(SharedRouting):
    """Base of the recurrences: ``cell(p_TP, h) -> h``, h [T, state_size] or None for h_0 = 0.

    Parameters as torch.nn's cells: weight_ih [GP, P], weight_hh [GP, P], bias_ih, bias_hh [GP] with :attr:`gates` G.
    """

    gates: int

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size = config[STATE_SIZE]
        self.weight_ih = nn.Parameter(torch.empty(self.gates * size, size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * size, size))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * size))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters anew by ``--moe-router-rnn-init``."""
        bound = 1 / math.sqrt(self.config[STATE_SIZE])
        for parameter in self.parameters():
            if self.config[RNN_INIT] == "standard":
                parameter.uniform_(-bound, bound)
            else:
                self.config.init_method(parameter)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four parameters in the dtype of the arithmetic."""
        return tuple(
            self.cast(weight, dtype) for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        )


class RecurrentLayer(RouterLayer):
    """Projector and head of one layer around the shared cell.

    Parameters: projector [P, H] and router [E, P], with ``--moe-router-rnn-bias`` projector_bias [P] and router_bias
    [E]; with another head than linear the module ``head`` in the place of router.
    """

    arguments = (STATE_SIZE, BIAS, RNN_INIT, RECURRENCE, HEAD, TEMPERATURE, XMOE_SIZE)

    @classmethod
    def check(cls, config: RoutingConfig) -> None:
        check_head(HEADS[config[HEAD]], config)

    @classmethod
    def own_state_size(cls, config: RoutingConfig) -> int:
        return config[STATE_SIZE]

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size, bias = config[STATE_SIZE], config[BIAS]
        self.projector = nn.Parameter(torch.empty(size, config.hidden_size))
        linear = config[HEAD] == "linear"
        self.router = nn.Parameter(torch.empty(config.num_experts, size)) if linear else None
        self.projector_bias = nn.Parameter(torch.empty(size)) if bias else None
        self.router_bias = nn.Parameter(torch.empty(config.num_experts)) if bias and linear else None
        self.head = None if linear else HEADS[config[HEAD]](config, size)

    def reset_parameters(self) -> None:
        """Projector and head by ``--moe-router-init``."""
        super().reset_parameters()
        if self.head is not None:
            self.head.reset_parameters()

    def read(self, h: Tensor) -> Tensor:
        """What the head reads of a state [..., own_state_size]: [..., P]."""
        return h

    def route(self, x_TH: Tensor, h_TP: Tensor | None, shared: SharedCell, dtype: torch.dtype):
        p_TP = linear_in_dtype(x_TH, self.projector, self.projector_bias, dtype)
        h_TP = shared(p_TP, h_TP)
        read_TP = self.read(h_TP)
        if self.head is not None:
            return self.head(read_TP, dtype), h_TP
        return linear_in_dtype(read_TP, self.router, self.router_bias, dtype), h_TP
