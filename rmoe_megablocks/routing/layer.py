"""The base of every router type: what one MoE layer owns of its router, and what holds for all types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from rmoe_megablocks.routing.arguments import Argument, not_negative
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.parts.initialisation import INIT, draw
from rmoe_megablocks.routing.parts.shared import SharedRouting

RESIDUAL = Argument(
    "--moe-router-residual",
    0.0,
    "Adds ALPHA times the previous MoE layer's scores to this layer's softmax, and passes the sum on (r-alpha of the "
    "RMoE ablation; 0 is off).",
    check=not_negative,
    metavar="ALPHA",
)
RECURRENCE = Argument(
    "--moe-router-recurrence",
    "full",
    "What becomes of the previous layer's state: full hands it on with its gradient, detach without, none leaves it "
    "out, so that every layer starts from 0.",
    choices=("full", "detach", "none"),
)


class RouterLayer(nn.Module):
    """One layer's router: hidden states and the previous layer's state in, logits and the next state out.

    A router type is a subclass. It says what it does in the first line of its docstring, lists its :attr:`arguments`,
    registers its parameters in ``__init__`` (frozen ones with ``requires_grad=False``), draws them in
    :meth:`reset_parameters` and computes in :meth:`route`. Parameters belong to this module itself or to children that
    are called as modules: Megatron waits for a module's gathered parameters when that module is called.

    Attributes:
        arguments: what the user may choose, beside those of the base classes.
        shared: class of what all layers share, None for nothing.
        index: which of the model's layers this is, from 0; the host sets it before the first call.
    """

    arguments: ClassVar[tuple[Argument, ...]] = (INIT, RESIDUAL)
    shared: ClassVar[type[SharedRouting] | None] = None
    index: int = 0

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        type(self).check(config)
        self.config = config

    @classmethod
    def check(cls, config: RoutingConfig) -> None:
        """Raises ValueError, one line, for sizes and options that do not go together."""

    @classmethod
    def own_state_size(cls, config: RoutingConfig) -> int:
        """Width of the state that :meth:`route` takes and returns; 0 for none."""
        return 0

    @classmethod
    def state_size(cls, config: RoutingConfig) -> int:
        """Width of what travels from layer to layer: the own state, unless cut, and the scores of a residual."""
        own = 0 if config[RECURRENCE] == "none" else cls.own_state_size(config)
        return own + (config.num_experts if config[RESIDUAL] else 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew. Here: matrices by ``--moe-router-init``, with the bias called NAME_bias."""
        parameters: Mapping[str, nn.Parameter] = dict(self.named_parameters(recurse=False))
        for name, weight in parameters.items():
            if not name.endswith("_bias"):
                draw(self.config, weight, parameters.get(name + "_bias"))

    def route(
        self, x_TH: Tensor, h_TP: Tensor | None, shared: SharedRouting | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The type's own step: logits [..., E] and its state [..., own_state_size] (None without), in ``dtype``.

        Args:
            x_TH: hidden states [..., H] in the model's dtype.
            h_TP: the previous layer's own state, None for h_0 = 0.
            shared: what all layers share, None if nothing.
            dtype: of the arithmetic.
        """
        raise NotImplementedError(f"{type(self).__name__} has no route")  # the registry takes no such class

    def forward(
        self,
        x_TH: Tensor,
        h_TP: Tensor | None = None,
        shared: SharedRouting | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and next state of this layer.

        Args:
            x_TH: hidden states [..., H]; leading dimensions are tokens, each on its own.
            h_TP: state of the previous MoE layer [..., state_size], None for h_0 = 0.
            shared: what all layers share.
            dtype: arithmetic and result dtype, default that of ``x_TH``. The weights may have another one.

        Returns:
            logits_TE [..., E] and h_TP [..., state_size] (None where it is 0), both in ``dtype``.

        Raises:
            ValueError: a width, tokens, a dtype or a device that do not belong together.
        """
        config, dtype = self.config, dtype or x_TH.dtype
        if x_TH.shape[-1:] != (config.hidden_size,):
            raise ValueError(
                f"hidden states must be [..., {config.hidden_size}] for this router, got {list(x_TH.shape)}"
            )
        size = self.state_size(config)
        if h_TP is not None:
            _check_state(h_TP, (*x_TH.shape[:-1], size), dtype, x_TH.device)
        alpha, recurrence = config[RESIDUAL], config[RECURRENCE]
        scores_TE = None
        if alpha and h_TP is not None:
            h_TP, scores_TE = h_TP.split((size - config.num_experts, config.num_experts), dim=-1)
        if recurrence == "none":
            h_TP = None
        elif recurrence == "detach" and h_TP is not None:
            h_TP = h_TP.detach()
        logits_TE, h_TP = self.route(x_TH, h_TP, shared, dtype)
        if recurrence == "none":
            h_TP = None
        if alpha:
            logits_TE, scores_TE = _add_scores(logits_TE, scores_TE, alpha)
            h_TP = scores_TE if h_TP is None else torch.cat((h_TP, scores_TE), dim=-1)
        return logits_TE, h_TP


def _add_scores(logits_TE: Tensor, scores_TE: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
    """scores_i = softmax(logits_i) + alpha * scores_{i-1}, and their logarithm, which is what a host's softmax takes.

    softmax(log(scores_i)) is scores_i over their sum, a number that depends on the layer alone: weights normalised
    over the chosen experts are those of scores_i.
    """
    logs_TE = logits_TE.log_softmax(-1)
    if scores_TE is not None:
        # a score of 0 has no logarithm: before the first MoE layer of a pipeline all of them are 0
        added = (alpha * scores_TE).clamp_min(torch.finfo(logs_TE.dtype).tiny)
        logs_TE = torch.logaddexp(logs_TE, added.log())
    return logs_TE, logs_TE.exp()


def _check_state(h_TP: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError for the state of other tokens or another model: broadcasting would hide it."""
    for what, found, expected in (
        ("shape", list(h_TP.shape), list(shape)),
        ("dtype", h_TP.dtype, dtype),
        ("device", h_TP.device, device),
    ):
        if found != expected:
            raise ValueError(f"the routing state must be None or of {what} {expected}, got {found}")
