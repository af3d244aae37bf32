"""Figures with a line a model: layers, the busiest experts, iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.report import style

#: title, label of the axis, how to read it; measures with axis layer
BY_LAYER = {
    "inside_balance": (
        "Inside balance",
        "best score / second best",
        "Above 1 the best expert has more than the second.",
    ),
    "outside_balance": (
        "Outside balance",
        "sum of selected scores (share)",
        "Near 1 the chosen experts have all the mass.",
    ),
    "entropy": ("Entropy of the scores", "entropy (nats)", "Low: sharp gates; at the chance line the gates are flat."),
    "margin": (
        "Margin of the selection",
        "margin (logits)",
        "K-th logit less the next: small, and little moves a choice.",
    ),
    "state_norm": (
        "Length of the routing state",
        "length (no unit)",
        "How long the state handed on to the next layer is.",
    ),
    "update_gate": ("Update gate", "mean gate (share)", "Near 1 the state is kept as the layer before left it."),
    "reset_gate": ("Reset gate", "mean gate (share)", "Near 0 the former state is not looked at."),
    "max_violation_global": (
        "MaxVio of all tokens",
        "largest load / mean load - 1",
        "0: all experts are equally busy.",
    ),
    "max_violation_batch": (
        "MaxVio of a batch",
        "largest load / mean load - 1",
        "As above, within batches of the text.",
    ),
    "gini": ("Gini coefficient of the loads", "Gini (0 to 1)", "0: equal loads; (E-1)/E: one expert has everything."),
    "dead_experts": ("Dead experts", "experts (number)", "Experts with less than 1 % of the mean load on this text."),
    "predictability": (
        "Predictability of the next layer",
        "right guesses (share)",
        "The next layer's choices told by this one's.",
    ),
    "expert_similarity": (
        "Similarity of experts' weights",
        "mean cosine x 3",
        "Of the weights; the paper's, with the diagonal.",
    ),
    "router_similarity": (
        "Similarity of router rows",
        "mean cosine (-1 to 1)",
        "Of different rows of a layer's router.",
    ),
}
#: measure, key of the value in it, key of its chance
WITHIN = {
    "domain_information": ("domain_specialisation", "information", "information_chance"),
    "transition_information": ("transitions", "information", "information_baseline"),
}
WITHIN_TITLES = {
    "domain_information": (
        "What a choice tells of the domain",
        "mutual information (nats)",
        "0: all domains go the same way; at most the entropy of the domains.",
    ),
    "transition_information": (
        "What a choice tells of the next layer's",
        "mutual information (nats)",
        "Of the chosen experts of neighbouring layers; shown at the first of the two.",
    ),
}
KINDS = {"input_token": "input token", "next_token": "next token", "predicted_token": "predicted token"}
#: label, number of the model, layers, value [L], chance [L], one number or None
_Line = tuple[str, int, Sequence[int], np.ndarray, Any]


def array(value: Any) -> np.ndarray:
    """float64, None as NaN."""
    return np.array(value, dtype=np.float64)


def by_layer(name: str, measured: Sequence[dict]) -> Any:
    """A Figure of a measure [L], or None where no model has it. Chance is dashed, in the model's colour."""
    lines: list[_Line] = []
    for number, one in enumerate(measured):
        measure = one["measures"].get(WITHIN[name][0] if name in WITHIN else name)
        if measure is None:
            continue
        value, chance = measure["value"], measure["baseline"]
        if name in WITHIN:
            where = measure.get("summary", measure)
            value, chance = where.get(WITHIN[name][1]), where.get(WITHIN[name][2])
        if value is None or not np.isfinite(array(value)).any():
            continue
        lines.append((labels(measured)[number], number, one["layers"], array(value), chance))
    if not lines:
        return None
    made = style.figure()
    ax = style.axes(made)
    _draw(ax, lines)
    ax.set_ylabel((WITHIN_TITLES if name in WITHIN else BY_LAYER)[name][1], fontsize=10)
    if name == "dead_experts":  # whole numbers, mostly 0
        ax.set_ylim(-0.05, max(1.0, ax.get_ylim()[1]))
    style.legend(made, ax)
    return made


def _draw(ax: Any, lines: Sequence[_Line]) -> None:
    dashed = [line for line in lines if line[4] is not None]
    chances = [np.broadcast_to(array(line[4]), line[3].shape) for line in dashed]
    one_for_all = all(one.shape == chances[0].shape and np.allclose(one, chances[0], equal_nan=True) for one in chances)
    for label, number, layers, value, _ in lines:
        look = {"color": style.MODEL_COLOURS[number], "marker": style.MODEL_MARKERS[number]}
        ax.plot(layers[: len(value)], value, label=label, linewidth=1.8, markersize=5, **look)
    for (label, number, layers, value, _), chance in zip(dashed, chances, strict=True):
        x = layers[: len(value)]
        look = style.CHANCE if one_for_all else style.CHANCE | {"color": style.MODEL_COLOURS[number]}
        xs, ys = (x, chance) if len(x) > 1 else ([x[0] - 0.5, x[0] + 0.5], np.repeat(chance, 2))
        ax.plot(xs, ys, label="chance" if one_for_all else f"chance, {label}", **look)
        if one_for_all:
            break
    ax.set_xlabel("layer of the model", fontsize=10)
    style.whole_ticks(ax.xaxis, sorted({layer for line in lines for layer in line[2][: len(line[3])]}))
    values = np.concatenate([line[3] for line in lines])
    if np.nanmax(values) > 100 * max(np.nanmin(values), 1e-9) > 0 and np.nanmin(values) > 0:
        ax.set_yscale("log")


def labels(measured: Sequence[dict]) -> list[str]:
    """Of the models: their names, with the iteration where two have the same."""
    names = [one["recording"]["name"] for one in measured]
    return [
        name if names.count(name) == 1 else f"{name} at {one['recording'].get('iteration')}"
        for name, one in zip(names, measured, strict=True)
    ]


def vocabulary(measured: Sequence[dict]) -> Any:
    """A panel a kind of token."""
    found = [(i, one["layers"], one["measures"].get("vocabulary_specialisation")) for i, one in enumerate(measured)]
    kinds = [kind for kind in KINDS if any(m and kind in m["coordinates"]["kind"] for _, _, m in found)]
    if not kinds:
        return None
    made = style.figure(3.4 * max(len(kinds), 2), 3.5)
    first = None
    for place, kind in enumerate(kinds, 1):
        ax = style.axes(made, 1, len(kinds), place)
        lines = []
        for number, layers, measure in found:
            if measure and kind in measure["coordinates"]["kind"]:
                row = measure["coordinates"]["kind"].index(kind)
                value = array(measure["value"][row])
                if np.isfinite(value).any():
                    lines.append((labels(measured)[number], number, layers, value, measure["baseline"][row]))
        if lines:
            _draw(ax, lines)
        ax.set_title(KINDS[kind], fontsize=10)
        ax.set_ylim(0, 1)
        first = first or ax
        if place == 1:
            ax.set_ylabel("share of K favourite experts", fontsize=10)
    style.legend(made, first)
    return made


def coverage(measured: Sequence[dict]) -> Any:
    """A panel a model: share of the choices of the N busiest experts, a line a layer."""
    found = [
        (label, one) for label, one in zip(labels(measured), measured, strict=True) if "coverage" in one["measures"]
    ]
    if not found:
        return None
    made = style.figure(3.6 * max(len(found), 1) + 1.2, 3.4)
    for place, (label, one) in enumerate(found, 1):
        ax = style.axes(made, 1, len(found), place)
        measure = one["measures"]["coverage"]
        lines, chance = array(measure["value"]), array(measure["baseline"])
        x = np.arange(1, lines.shape[1] + 1)
        _by_depth(ax, x, lines, one["layers"])
        ax.plot(x, np.broadcast_to(chance, lines.shape)[0], label="chance", **style.CHANCE)
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("N busiest experts", fontsize=10)
        style.whole_ticks(ax.xaxis, x.tolist(), 8)
        ax.set_ylim(0, 1.03)
        if place == 1:
            ax.set_ylabel("share of all choices", fontsize=10)
    style.legends(made)
    return made


def over_training(name: str, measured: Sequence[dict]) -> Any:
    """``saturation``, or MaxVio of ``load_over_training``, [steps, L]; a panel a model."""
    found = [(label, one) for label, one in zip(labels(measured), measured, strict=True) if name in one["measures"]]
    if not found:
        return None
    made = style.figure(3.6 * len(found) + 1.2, 3.4)
    for place, (label, one) in enumerate(found, 1):
        ax = style.axes(made, 1, len(found), place)
        measure = one["measures"][name]
        load = name == "load_over_training"
        lines = array(measure["max_violation"] if load else measure["value"]).T
        steps = measure["coordinates"]["step"]
        _by_depth(ax, steps, lines, one["layers"])
        if load:
            ax.axhline(0, label="all loads equal", **style.CHANCE)
        elif measure["baseline"] is not None:
            chance = np.broadcast_to(array(measure["baseline"]), lines.T.shape).mean(1)
            ax.plot(steps, chance, label="chance, mean of layers", **style.CHANCE)
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("iteration", fontsize=10)
        if place == 1:
            ax.set_ylabel("MaxVio (share of mean load)" if load else "same choices as the last (share)", fontsize=10)
    style.legends(made)
    return made


def _by_depth(ax: Any, x: Sequence[float], lines: np.ndarray, layers: Sequence[int]) -> None:
    """From dark to light with the depth; of many layers the first, middle and last are named."""
    from matplotlib import colormaps

    named = {0, len(lines) // 2, len(lines) - 1} if len(lines) > 6 else set(range(len(lines)))
    for number, line in enumerate(lines):
        colour = colormaps["viridis"](0.85 * number / max(len(lines) - 1, 1))
        ax.plot(x, line, color=colour, linewidth=1.5, label=f"layer {layers[number]}" if number in named else None)
