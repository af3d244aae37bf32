"""Cosines of a model's experts, and of its routers' rows, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe_megablocks.analysis.measures.weights import expert_similarity, row_similarity

#: of a router layer, the first that it has
ROUTER_ROWS = ("router", "head.weight", "reader.weight", "head.embeddings", "reader.embeddings")


def similarities(model: torch.nn.Module, found: Any) -> dict[str, np.ndarray]:
    """Matrices [L, E, E] of a model of transformers with the routers ``found``, without what it has no weights for.

    Experts are those of gate_up_proj [E, 2F, H] and down_proj [E, H, F], as ours, Mixtral's and OLMoE's.
    """
    layers = [model.base_model.layers[number - 1] for number in found.modules]
    experts = found.kind.experts

    def of_layer(layer: torch.nn.Module) -> tuple[Tensor, Tensor] | None:
        for module in layer.modules():
            pair = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
            if all(torch.is_tensor(weight) and weight.dim() == 3 and len(weight) == experts for weight in pair):
                return pair
        return None

    def rows(router: torch.nn.Module) -> Tensor | None:
        weight = getattr(router, "weight", None)
        return router_rows(router.layer) if weight is None and getattr(router, "layer", None) is not None else weight

    return gathered(
        experts,
        (partial(of_layer, layer) for layer in layers),
        (partial(rows, router) for router in found.modules.values()),
    )


def router_rows(layer: torch.nn.Module) -> Tensor | None:
    """The matrix [E, P] or [E, H] that gives a router layer its logits, if one alone does."""
    for name in ROUTER_ROWS:
        found: Any = layer
        for part in name.split("."):
            found = getattr(found, part, None)
        if torch.is_tensor(found):
            return found
    return None


def gathered(
    experts: int,
    pairs: Iterable[Callable[[], tuple[Tensor, Tensor] | None]],
    rows: Iterable[Callable[[], Tensor | None]],
) -> dict[str, np.ndarray]:
    """One layer's weights in memory at a time; what a layer has not is left out for all."""
    found = {
        "expert_similarity_LEE": [_of_experts(read()) for read in pairs],
        "router_similarity_LEE": [_of_rows(read(), experts) for read in rows],
    }
    return {name: np.stack(layers) for name, layers in found.items() if all(one is not None for one in layers)}


def _of_experts(pair: tuple[Tensor, Tensor] | None) -> np.ndarray | None:
    if pair is None or pair[0].shape[1] != 2 * pair[1].shape[2]:
        return None
    gate_up_EFH, down_EHF = (weight.detach().float().cpu().numpy() for weight in pair)
    width = down_EHF.shape[2]
    return expert_similarity(gate_up_EFH[:, :width], gate_up_EFH[:, width:], down_EHF)


def _of_rows(rows: Tensor | None, experts: int) -> np.ndarray | None:
    if rows is None or rows.dim() != 2 or len(rows) < experts:
        return None
    return row_similarity(rows[:experts].detach().float().cpu().numpy())
