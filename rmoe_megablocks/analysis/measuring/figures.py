"""One figure a measure: what stands for the whole model beside others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measuring.entries import mean_over, plain

#: figures in the order in which they are told, with a title of at most 26 characters
TITLES = {
    "mutual_information": "MI of layers, nats",
    "mutual_information_above_chance": "MI above chance, nats",
    "inside_balance": "inside balance",
    "outside_balance": "outside balance",
    "entropy": "entropy, nats",
    "margin": "margin, logits",
    "state_norm": "state norm",
    "update_gate": "update gate",
    "reset_gate": "reset gate",
    "max_violation_global": "MaxVio, global",
    "max_violation_batch": "MaxVio, batch",
    "gini": "Gini",
    "dead_experts": "dead experts",
    "transition_information": "MI of choices, nats",
    "predictability": "predictability",
    "path_entropy": "path entropy, nats",
    "domain_specialisation": "MI of domain, nats",
    "input_token_specialisation": "input token spec.",
    "next_token_specialisation": "next token spec.",
    "predicted_token_specialisation": "predicted token spec.",
    "expert_similarity": "expert similarity",
    "expert_similarity_of_others": "expert sim., others",
    "router_similarity": "router similarity",
}


def figures(measures: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """By name ``value`` and ``chance`` (None where there is none): means over layers, of the mutual information over
    pairs of different layers, of dead experts the number in all layers."""
    found: dict[str, tuple[float, float | None]] = {}
    for name, build in _BUILDERS.items():
        if name in measures:
            found |= build(name, measures[name])
    return {
        name: {"value": plain(float(found[name][0])), "chance": plain(found[name][1])}
        for name in TITLES
        if name in found
    }


def _array(value: Any) -> np.ndarray:
    return np.array(value, dtype=np.float64)  # None becomes NaN


def _mean(value: Any) -> float:
    return float(mean_over(_array(value).reshape(-1)))


def _of_layers(name: str, measure: Mapping) -> dict:
    chance = measure["baseline"]
    return {name: (_mean(measure["value"]), None if chance is None else _mean(chance))}


def _information(name: str, measure: Mapping) -> dict:
    value, chance = _array(measure["value"]), _array(measure["baseline"])
    if len(value) < 2:
        return {}
    pairs = np.triu_indices(len(value), 1)
    # of the shuffled both orders, of which one layer's tokens are shuffled and then the other's
    by_chance = _mean(((chance + chance.T) / 2)[pairs])
    return {name: (_mean(value[pairs]), by_chance), f"{name}_above_chance": (_mean(value[pairs]) - by_chance, 0.0)}


def _dead(name: str, measure: Mapping) -> dict:
    return {name: (float(np.sum(measure["value"])), measure["baseline"] * len(measure["value"]))}


def _transitions(name: str, measure: Mapping) -> dict:
    return {"transition_information": (_mean(measure["information"]), _mean(measure["information_baseline"]))}


def _paths(name: str, measure: Mapping) -> dict:
    return {"path_entropy": (measure["value"]["entropy"], measure["baseline"]["entropy"])}


def _domains(name: str, measure: Mapping) -> dict:
    return {name: (_mean(measure["summary"]["information"]), _mean(measure["summary"]["information_chance"]))}


def _vocabulary(name: str, measure: Mapping) -> dict:
    rows = zip(measure["coordinates"]["kind"], measure["value"], measure["baseline"], strict=True)
    return {f"{kind}_specialisation": (_mean(value), _mean(chance)) for kind, value, chance in rows}


def _experts(name: str, measure: Mapping) -> dict:
    others = _mean(measure["without_diagonal"]), _mean(measure["without_diagonal_baseline"])
    return _of_layers(name, measure) | {f"{name}_of_others": others}


_BUILDERS: dict[str, Callable[[str, Mapping], dict]] = dict.fromkeys(
    (
        "inside_balance",
        "outside_balance",
        "entropy",
        "margin",
        "state_norm",
        "update_gate",
        "reset_gate",
        "max_violation_global",
        "max_violation_batch",
        "gini",
        "predictability",
        "router_similarity",
    ),
    _of_layers,
) | {
    "mutual_information": _information,
    "dead_experts": _dead,
    "transitions": _transitions,
    "paths": _paths,
    "domain_specialisation": _domains,
    "vocabulary_specialisation": _vocabulary,
    "expert_similarity": _experts,
}
