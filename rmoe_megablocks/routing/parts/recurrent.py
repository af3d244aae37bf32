"""Routers around a recurrence that all layers share: projector (Eq. 4), cell (Eq. 5), head (Eq. 6)."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from rmoe_megablocks.kernels import LARGEST_SIZE, linear_in_dtype
from rmoe_megablocks.routing.arguments import Argument, at_least
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RECURRENCE, RouterLayer
from rmoe_megablocks.routing.parts.heads import HEADS, TEMPERATURE, XMOE_SIZE, Linear, check_head
from rmoe_megablocks.routing.parts.implementation import AUTO, EAGER, IMPL, TRITON
from rmoe_megablocks.routing.parts.shared import SharedRouting
from rmoe_megablocks.routing.parts.sharing import SHARE_HEAD, SHARE_PROJECTOR, Blocks, check_blocks, is_shared

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
    Projectors and heads that layers share are children, one a block of layers: projectors.B.weight [P, H] and .bias
    [P], heads.B as :mod:`.heads` has them. They are drawn behind the cell, by ``--moe-router-init``.
    """

    gates: int

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size, bias = config[STATE_SIZE], config[BIAS]
        self.weight_ih = nn.Parameter(torch.empty(self.gates * size, size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * size, size))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * size))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * size))
        self.reset_parameters()
        self.projectors = self.heads = None
        if is_shared(config, SHARE_PROJECTOR):
            self.projectors = Blocks(config, SHARE_PROJECTOR, partial(Linear, config, config.hidden_size, size, bias))
        if is_shared(config, SHARE_HEAD):
            self.heads = Blocks(config, SHARE_HEAD, partial(HEADS[config[HEAD]], config, size, bias))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the cell's own parameters anew by ``--moe-router-rnn-init``."""
        bound = 1 / math.sqrt(self.config[STATE_SIZE])
        for parameter in self.parameters(recurse=False):
            if self.config[RNN_INIT] == "standard":
                parameter.uniform_(-bound, bound)
            else:
                self.config.init_method(parameter)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four parameters in the dtype of the arithmetic."""
        return tuple(
            self.cast(weight, dtype) for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        )

    def unused_by(self, layers: set[int]) -> list[int]:
        """The first layer of every block that has none of ``layers``; at least one layer if there are none at all."""
        used, further = set(layers), super().unused_by(layers)
        used.update(further)
        for blocks in (self.projectors, self.heads):
            for first in [] if blocks is None else range(0, self.config.num_layers, blocks.size):
                if used.isdisjoint(range(first, first + blocks.size)):
                    further.append(first)
                    used.add(first)
        return further


class RecurrentLayer(RouterLayer):
    """Projector and head of one layer around the shared cell.

    Parameters: projector [P, H] and router [E, P], with ``--moe-router-rnn-bias`` projector_bias [P] and router_bias
    [E]; with another head than linear the module ``head`` in the place of router. What is shared by further layers is
    the shared cell's.

    Attributes:
        implementations: whether the type has other forms than eager for ``--moe-router-impl``.
    """

    implementations: ClassVar[bool] = False
    arguments = (
        *(STATE_SIZE, BIAS, RNN_INIT, RECURRENCE, HEAD, TEMPERATURE, XMOE_SIZE, SHARE_PROJECTOR, SHARE_HEAD),
        IMPL,
    )

    @classmethod
    def check(cls, config: RoutingConfig) -> None:
        check_head(HEADS[config[HEAD]], config)
        for argument in (SHARE_PROJECTOR, SHARE_HEAD):
            check_blocks(config, argument)
        impl = config[IMPL]
        if not cls.implementations and impl not in (AUTO, EAGER):
            raise ValueError(f"{IMPL.option} {impl}: {cls.__name__} has torch's operations alone; use {AUTO}")
        largest = max(config[STATE_SIZE], config.num_experts)
        if impl == TRITON and largest > LARGEST_SIZE:
            raise ValueError(
                f"{IMPL.option} {impl}: a state and experts of at most {LARGEST_SIZE}, not {largest}; use {AUTO}"
            )

    @classmethod
    def own_state_size(cls, config: RoutingConfig) -> int:
        return config[STATE_SIZE]

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size, bias = config[STATE_SIZE], config[BIAS]
        projects, reads = (not is_shared(config, argument) for argument in (SHARE_PROJECTOR, SHARE_HEAD))
        linear = config[HEAD] == "linear" and reads
        self.projector = nn.Parameter(torch.empty(size, config.hidden_size)) if projects else None
        self.router = nn.Parameter(torch.empty(config.num_experts, size)) if linear else None
        self.projector_bias = nn.Parameter(torch.empty(size)) if bias and projects else None
        self.router_bias = nn.Parameter(torch.empty(config.num_experts)) if bias and linear else None
        self.head = HEADS[config[HEAD]](config, size) if reads and not linear else None

    def reset_parameters(self) -> None:
        """Projector and head by ``--moe-router-init``."""
        super().reset_parameters()
        if self.head is not None:
            self.head.reset_parameters()

    def read(self, h: Tensor) -> Tensor:
        """What the head reads of a state [..., own_state_size]: [..., P]."""
        return h

    def project(self, x_TH: Tensor, shared: SharedCell, dtype: torch.dtype) -> Tensor:
        """x' [..., P] in ``dtype`` (Eq. 4)."""
        if self.projector is None:
            return shared.projectors.of(self.index)(x_TH, dtype)
        return linear_in_dtype(x_TH, self.projector, self.projector_bias, dtype)

    def read_out(self, h_TP: Tensor, shared: SharedCell, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits [..., E] of the state [..., own_state_size], and the state."""
        read_TP = self.read(h_TP)
        if self.router is not None:
            return linear_in_dtype(read_TP, self.router, self.router_bias, dtype), h_TP
        head = shared.heads.of(self.index) if self.head is None else self.head
        return head(read_TP, dtype), h_TP

    def route(self, x_TH: Tensor, h_TP: Tensor | None, shared: SharedCell, dtype: torch.dtype):
        return self.read_out(shared(self.project(x_TH, shared, dtype), h_TP), shared, dtype)
