"""What a router did with each token: choices, scores, margin, state and gates, for hosts that record it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rmoe_megablocks.routing.layer import RECURRENCE, RouterLayer
from rmoe_megablocks.routing.parts.recurrent import RecurrentLayer, SharedCell
from rmoe_megablocks.routing.reference import gru_gates
from rmoe_megablocks.routing.types.stateful.gru import GRUCell

#: environment variable: the folder to which a host's processes write rows of :func:`row_dtype`
RECORD_TO = "RMOE_RECORD_ROUTING"


def row_dtype(experts: int, topk: int, carried: tuple[str, ...]) -> np.dtype:
    """One token of one layer, as processes hand it over; ``carried``: names of :func:`carries`."""
    fields = [("choices", "<i2", (topk,)), ("scores", "<f2", (experts,)), ("margin", "<f4")]
    return np.dtype([*fields, *((name, "<f4") for name in carried)])


@dataclass(frozen=True)
class Choice:
    """Attributes:
    choices_TK: int16, the best first; -1 for a null expert.
    scores_TE: float16, of all real experts before the selection.
    margin_T: float32, the least chosen selection logit less the largest other one; nan where all are chosen.
    """

    choices_TK: Tensor
    scores_TE: Tensor
    margin_T: Tensor


def choice_of(
    logits_TN: Tensor,
    chosen_TE: Tensor,
    experts: int,
    topk: int,
    score_function: str,
    expert_bias_E: Tensor | None = None,
) -> Choice:
    """What the host has chosen, in order, and by how much.

    A selection logit is what the host ranks: the logit, of sigmoid routers the score with the expert bias. Where it
    chooses within groups of experts the margin can be negative.

    Args:
        logits_TN: [T, E + M]; columns from E on are null experts.
        chosen_TE: bool [T, E], the host's own choice of real experts; null ones fill it up to K.
        score_function: softmax (over all N) or sigmoid.
    """
    logits_TN = logits_TN.float()
    scores_TN = logits_TN.softmax(-1) if score_function == "softmax" else logits_TN.sigmoid()
    selection_TN = logits_TN if score_function == "softmax" else scores_TN
    if expert_bias_E is not None:
        selection_TN = selection_TN + expert_bias_E.float()
    chosen_TN = chosen_TE
    if logits_TN.shape[1] > experts:
        missing_T1 = topk - chosen_TE.sum(-1, keepdim=True)
        rank_TM = logits_TN[:, experts:].argsort(dim=-1, descending=True, stable=True).argsort(-1)
        chosen_TN = torch.cat((chosen_TE, rank_TM < missing_T1), dim=-1)
    ranked_TN = selection_TN.masked_fill(~chosen_TN, -torch.inf)
    values_TN, order_TN = ranked_TN.sort(dim=-1, descending=True, stable=True)
    values_TK, choices_TK = values_TN[:, :topk], order_TN[:, :topk]
    # capacity or quantiles may have left a token fewer than K
    choices_TK = choices_TK.masked_fill((choices_TK >= experts) | values_TK.isneginf(), -1)
    others_T = selection_TN.masked_fill(chosen_TN, -torch.inf).amax(-1)
    least_T = selection_TN.masked_fill(~chosen_TN, torch.inf).amin(-1)
    margin_T = (least_T - others_T).masked_fill(chosen_TN.all(-1) | ~chosen_TN.any(-1), torch.nan)
    return Choice(choices_TK.to(torch.int16), scores_TN[:, :experts].half(), margin_T)


@dataclass(frozen=True)
class Carried:
    """A layer's state after its step, each [T], fp32: length of what the head reads of it, means of the gates over P.

    None for what the type has not: gates are the GRU's.
    """

    state_norm_T: Tensor | None = None
    update_gate_T: Tensor | None = None
    reset_gate_T: Tensor | None = None


def carries(layer: RouterLayer | None) -> tuple[str, ...]:
    """Which of :class:`Carried` a layer of a model will have."""
    if layer is None or not layer.own_state_size(layer.config):
        return ()
    if isinstance(layer, RecurrentLayer):
        gates = ("update_gate", "reset_gate") if issubclass(layer.shared, GRUCell) else ()
        return ("state_norm", *gates)
    return () if layer.config[RECURRENCE] == "none" else ("state_norm",)


class StateWatch:
    """Sees the states of router layers go by, each layer's last one until it is taken."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Args: modules: all of a model, or of its chunks in this process."""
        self._seen: dict[RouterLayer, Carried] = {}
        self._cell: tuple[SharedCell, Tensor, Tensor | None, Tensor] | None = None
        self._hooks = []
        for module in modules:
            if isinstance(module, RouterLayer):
                self._hooks.append(module.register_forward_hook(self._on_layer))
            elif isinstance(module, SharedCell):
                self._hooks.append(module.register_forward_hook(self._on_cell))

    def take(self, layer: RouterLayer | None) -> Carried:
        """Of the layer's last call; of nothing for the host's own router."""
        return Carried() if layer is None else self._seen.pop(layer)

    def remove(self) -> None:
        """Takes the hooks back."""
        for hook in self._hooks:
            hook.remove()

    def _on_cell(self, cell: SharedCell, inputs: tuple, output) -> None:
        p_TP, h_TP, *_ = inputs
        self._cell = (cell, p_TP, h_TP, output[1] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def _on_layer(self, layer: RouterLayer, _inputs: tuple, output: tuple) -> None:
        seen, self._cell = self._cell, None
        self._seen[layer] = Carried()
        if seen is not None:
            cell, p_TP, h_TP, state_TP = seen
            gates = {}
            if isinstance(cell, GRUCell):
                h_TP = torch.zeros_like(p_TP) if h_TP is None else h_TP
                reset_TP, update_TP, _ = gru_gates(p_TP, h_TP, *cell.weights(p_TP.dtype))
                gates = {"update_gate_T": _mean(update_TP), "reset_gate_T": _mean(reset_TP)}
            read_TP = layer.read(state_TP) if isinstance(layer, RecurrentLayer) else state_TP
            self._seen[layer] = Carried(_length(read_TP), **gates)
        elif "state_norm" in carries(layer):
            own = layer.own_state_size(layer.config)
            self._seen[layer] = Carried(_length(output[1][..., :own]))


def _mean(x_TP: Tensor) -> Tensor:
    return x_TP.float().mean(-1).flatten()


def _length(x_TP: Tensor) -> Tensor:
    return x_TP.float().norm(dim=-1).flatten()
