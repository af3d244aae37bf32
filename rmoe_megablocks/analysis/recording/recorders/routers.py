"""The routers of a model of transformers, ours or another one's, and what each call of one chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.huggingface.layers.moe import RmoeRouter
from rmoe_megablocks.routing.watching import Choice, choice_of

_CLOSE = 0.02  # of bfloat16's weights


@dataclass(frozen=True)
class Kind:
    """What all routers of a model have in common; the rest as in :class:`..about.About`."""

    router_type: str
    experts: int
    topk: int
    null_experts: int
    score_function: str


@dataclass(frozen=True)
class Found:
    """Routers by the number, from 1, of their layer; ``choice`` of a router's output."""

    kind: Kind
    modules: dict[int, torch.nn.Module]
    choice: Callable[[torch.nn.Module, tuple], Choice]


def find(model: torch.nn.Module, name: object) -> Found:
    """The routers of ``model``. Raises UsageError for a dense one, or one that does not tell what it chose."""
    ours = _by_layer(model, RmoeRouter)
    if ours:
        config = model.config
        kind = Kind(
            config.router_type,
            config.num_experts,
            config.num_experts_per_tok,
            config.num_null_experts,
            config.router_score_function,
        )
        return Found(kind, ours, _choice_of_ours)
    recorded = _recorded(model)
    if recorded is None:
        raise UsageError(f"{name} has no router: a dense model ({model.config.model_type}) has nothing to analyze")
    theirs = _by_layer(model, recorded.target_class)
    config = model.config.get_text_config()
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    topk = _first(config, "num_experts_per_tok", "moe_topk", "moe_k")
    if not theirs or experts is None or topk is None:
        raise UsageError(f"{name}: a {model.config.model_type} does not say how many experts its routers choose from")

    def choice(router: torch.nn.Module, output: Any) -> Choice:
        return _choice_of_theirs(router, output, experts, topk, f"{name}: a {model.config.model_type}")

    return Found(Kind("linear", experts, topk, 0, "softmax"), theirs, choice)


def _by_layer(model: torch.nn.Module, kind: type) -> dict[int, torch.nn.Module]:
    layers = enumerate(getattr(model.base_model, "layers", ()), 1)
    return {number: module for number, layer in layers for module in layer.modules() if isinstance(module, kind)}


def _recorded(model: torch.nn.Module) -> Any | None:
    """What the library records router logits with."""
    said = getattr(model.base_model, "_can_record_outputs", None) or {}
    found = said.get("router_logits")
    return found if hasattr(found, "target_class") else None


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _choice_of_ours(router: RmoeRouter, output: tuple) -> Choice:
    logits_TN, _, experts_TK, _ = output
    config = router.config
    experts, topk = config.num_experts, config.num_experts_per_tok
    chosen_TN = torch.zeros_like(logits_TN, dtype=torch.bool)
    if config.num_null_experts:  # in their places stand real experts of no weight
        places_TK = logits_TN.topk(topk, dim=-1).indices
        if not torch.equal(places_TK % experts, experts_TK):
            raise RuntimeError("the router's choice of null experts is not that of its logits")
    else:
        places_TK = experts_TK
    chosen_TN.scatter_(-1, places_TK, True)
    bias_E = router.expert_bias
    return choice_of(logits_TN, chosen_TN[:, :experts], experts, topk, config.router_score_function, bias_E)


def _choice_of_theirs(router: torch.nn.Module, output: Any, experts: int, topk: int, name: str) -> Choice:
    """Of a router that returns logits, weights and experts, as Mixtral's and OLMoE's. Raises UsageError for others."""
    why = f"{name} has routers that this does not read ({type(router).__name__}): "
    if not isinstance(output, tuple) or len(output) != 3 or not all(map(torch.is_tensor, output)):
        raise UsageError(f"{why}they do not return logits, weights and experts")
    logits, weights, chosen = output
    logits_TE, weights_TK, chosen_TK = (x.reshape(-1, x.shape[-1]) for x in (logits, weights, chosen))
    if chosen_TK.is_floating_point() or chosen_TK.shape[1] != topk or logits_TE.shape[1] != experts:
        raise UsageError(f"{why}what they return is not [tokens, {experts}] logits and {topk} experts")
    shares_TK = logits_TE.float().softmax(-1).gather(-1, chosen_TK)
    if weights_TK.shape != chosen_TK.shape or not _alike(shares_TK, weights_TK.float()):
        raise UsageError(f"{why}their weights are not a softmax of their logits")
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, chosen_TK, True)
    return choice_of(logits_TE, chosen_TE, experts, topk, "softmax")


def _alike(ours_TK: Tensor, theirs_TK: Tensor) -> bool:
    ours_TK, theirs_TK = (x / x.sum(-1, keepdim=True) for x in (ours_TK, theirs_TK))
    return bool(((ours_TK - theirs_TK).abs() < _CLOSE).all())
