"""What reads a vector and gives E logits: the router matrix of Eq. 6 and its alternatives, for states and for x alike.

The definitions: cosine as Tutel's and the RMoE paper's baseline, xmoe as X-MoE (arXiv 2204.09179) in the CompeteSMoE
code base, product_key as PEER (arXiv 2407.04153).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing.arguments import Argument, above_zero, at_least
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RouterLayer
from rmoe_megablocks.routing.parts.initialisation import draw
from rmoe_megablocks.routing.parts.shared import Shareable

TEMPERATURE = Argument(
    "--moe-router-temperature",
    0.3,
    "What similarities to the experts' embeddings are divided by: fixed with xmoe, where training starts with cosine.",
    check=above_zero,
    metavar="TAU",
)
XMOE_SIZE = Argument(
    "--moe-router-xmoe-hidden-size",
    16,
    "Width of the space in which xmoe compares tokens with experts.",
    check=at_least(1),
    metavar="D",
)
_ORTHOGONAL_GAIN = 0.32
_EMBEDDING_NORM = 1.5
_LARGEST_SCALE = 100.0


class Linear(Shareable):
    """W v (+ b); parameters weight [M, N], bias [M]."""

    def __init__(self, config: RoutingConfig, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def reset_parameters(self) -> None:
        """Draws matrix and bias by ``--moe-router-init``."""
        draw(self.config, self.weight, self.bias)

    def forward(self, v_TN: Tensor, dtype: torch.dtype) -> Tensor:
        """v [..., N] -> [..., M] in ``dtype``."""
        bias = None if self.bias is None else self.cast(self.bias, dtype)
        return linear_in_dtype(v_TN, self.cast(self.weight, dtype), bias, dtype)


class LinearHead(Linear):
    """logits = W v (+ b); parameters weight [E, N], bias [E]."""

    def __init__(self, config: RoutingConfig, inputs: int, bias: bool = False) -> None:
        super().__init__(config, inputs, config.num_experts, bias)


class CosineHead(Shareable):
    """logits = cos(v, e_i) * scale; parameters embeddings [E, N] and log_scale [1], learnt from 1/tau on."""

    def __init__(self, config: RoutingConfig, inputs: int, bias: bool = False) -> None:
        super().__init__(config)
        self.embeddings = nn.Parameter(torch.empty(config.num_experts, inputs))
        self.log_scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal embeddings, whatever ``--moe-router-init``: their length does not matter."""
        nn.init.orthogonal_(self.embeddings, gain=_ORTHOGONAL_GAIN)
        self.log_scale.fill_(-math.log(self.config[TEMPERATURE]))

    def forward(self, v_TN: Tensor, dtype: torch.dtype) -> Tensor:
        """v [..., N] -> logits [..., E] in ``dtype``."""
        similarities_TE = (
            F.normalize(v_TN.to(dtype), dim=-1) @ F.normalize(self.cast(self.embeddings, dtype), dim=-1).mT
        )
        return similarities_TE * self.cast(self.log_scale, dtype).clamp_max(math.log(_LARGEST_SCALE)).exp()


class XMoEHead(Shareable):
    """logits = (W v) . e_i/|e_i| / tau; parameters projection [D, N], embeddings [E, D].

    The code base rescales the embeddings' rows to a norm of 1.5 before every forward pass. They start with it here and
    are not written again: the logits are the same, and neither recompute nor an optimizer with main parameters of its
    own takes a weight that a forward pass changes.
    """

    def __init__(self, config: RoutingConfig, inputs: int, bias: bool = False) -> None:
        super().__init__(config)
        self.projection = nn.Parameter(torch.empty(config[XMOE_SIZE], inputs))
        self.embeddings = nn.Parameter(torch.empty(config.num_experts, config[XMOE_SIZE]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The projection by ``--moe-router-init``, the embeddings orthogonal, of length 1.5."""
        draw(self.config, self.projection)
        nn.init.orthogonal_(self.embeddings, gain=_ORTHOGONAL_GAIN)
        self.embeddings.mul_(_EMBEDDING_NORM / self.embeddings.norm(dim=-1, keepdim=True))

    def forward(self, v_TN: Tensor, dtype: torch.dtype) -> Tensor:
        """v [..., N] -> logits [..., E] in ``dtype``."""
        reduced_TD = linear_in_dtype(v_TN, self.cast(self.projection, dtype), None, dtype)
        return reduced_TD @ F.normalize(self.cast(self.embeddings, dtype), dim=-1).mT / self.config[TEMPERATURE]


class ProductKeyHead(Shareable):
    """E = n * n: logits_(i,j) = (W_a v)_i + (W_b v)_j; parameters rows, columns [n, N]."""

    def __init__(self, config: RoutingConfig, inputs: int, bias: bool = False) -> None:
        super().__init__(config)
        self.rows = nn.Parameter(torch.empty(math.isqrt(config.num_experts), inputs))
        self.columns = nn.Parameter(torch.empty(math.isqrt(config.num_experts), inputs))

    def reset_parameters(self) -> None:
        """Draws both matrices by ``--moe-router-init``."""
        draw(self.config, self.rows)
        draw(self.config, self.columns)

    def forward(self, v_TN: Tensor, dtype: torch.dtype) -> Tensor:
        """v [..., N] -> logits [..., E] in ``dtype``, of the experts (0, 0), (0, 1), ..."""
        rows_TR = linear_in_dtype(v_TN, self.cast(self.rows, dtype), None, dtype)
        columns_TC = linear_in_dtype(v_TN, self.cast(self.columns, dtype), None, dtype)
        return (rows_TR[..., :, None] + columns_TC[..., None, :]).flatten(-2)


HEADS = {"linear": LinearHead, "cosine": CosineHead, "xmoe": XMoEHead, "product_key": ProductKeyHead}


def check_head(head: type[nn.Module], config: RoutingConfig) -> None:
    """Raises ValueError for a number of experts that ``head`` cannot address."""
    if head is ProductKeyHead and math.isqrt(config.num_experts) ** 2 != config.num_experts:
        raise ValueError(f"product_key needs a square number of experts, as 16 or 64, got {config.num_experts}")


class HeadLayer(RouterLayer):
    """A head that reads the hidden states themselves: a router type without a state."""

    head: ClassVar[type[nn.Module]]

    @classmethod
    def check(cls, config: RoutingConfig) -> None:
        check_head(cls.head, config)

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.reader = self.head(config, config.hidden_size)

    def reset_parameters(self) -> None:
        """As the head draws them."""
        self.reader.reset_parameters()

    def route(self, x_TH: Tensor, h_TP: None, shared: None, dtype: torch.dtype):
        return self.reader(x_TH, dtype), None
