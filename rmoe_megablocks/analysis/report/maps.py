"""Figures of matrices: a panel a model (and layer), coloured by how far they are from chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.report import style
from rmoe_megablocks.analysis.report.curves import array, labels

#: most domains in a figure
DOMAINS = 6


def _panels(
    panels: Sequence[tuple], columns: int, bar: str, *, centre: float | None, limits: tuple[float, float] | None
) -> Any:
    """Panels (title, matrix, label x, label y, ticks x, ticks y), row by row; one colour bar."""
    rows = -(-len(panels) // columns)
    wide = 2.9
    made = style.figure(max(wide * columns + 1.0, 4.4), wide * rows + 0.3)
    everything = np.concatenate([panel[1].reshape(-1) for panel in panels])
    finite = everything[np.isfinite(everything)]
    low, high = limits or (finite.min(), finite.max())
    if centre is not None:
        reach = max(abs(high - centre), abs(low - centre), 1e-3)
        low, high = centre - reach, centre + reach
    shown = None
    places = []
    for place, (title, matrix, label_x, label_y, ticks_x, ticks_y) in enumerate(panels, 1):
        ax = made.add_subplot(rows, columns, place)
        square = "equal" if matrix.shape[0] == matrix.shape[1] else "auto"
        colours = "viridis" if centre is None else "PuOr_r"
        shown = ax.imshow(
            np.ma.masked_invalid(matrix), colours, vmin=low, vmax=high, aspect=square, interpolation="nearest"
        )
        ax.set_facecolor("#cccccc")
        ax.set_title(title, fontsize=9.5)
        ax.set_xlabel(label_x, fontsize=9)
        ax.set_ylabel(label_y, fontsize=9)
        for axis, names in ((ax.xaxis, ticks_x), (ax.yaxis, ticks_y)):
            step = -(-len(names) // 8)
            axis.set_ticks(range(0, len(names), step), [str(one) for one in names[::step]], fontsize=8)
        places.append(ax)
    bar_drawn = made.colorbar(shown, ax=places, fraction=0.05)
    bar_drawn.set_label(bar, fontsize=9)
    bar_drawn.ax.tick_params(labelsize=8)
    if centre is not None:
        bar_drawn.ax.axhline(centre, color="#111111", linewidth=1.5)
    return made


def _having(name: str, measured: Sequence[dict]) -> list[tuple[str, dict, dict]]:
    return [
        (label, one, one["measures"][name])
        for label, one in zip(labels(measured), measured, strict=True)
        if name in one["measures"]
    ]


def information(measured: Sequence[dict]) -> Any:
    """Mutual information of layers, adjusted: 0 by chance, 1 of a copy. None of one layer."""
    panels = []
    for label, one, measure in _having("mutual_information", measured):
        if len(one["layers"]) < 2:
            continue
        value, chance = array(measure["value"]), array(measure["baseline"])
        matrix = measure.get("adjusted")
        if matrix is None:
            entropy = np.diagonal(value)
            most = (entropy[:, None] + entropy) / 2 - chance
            matrix = np.where(most > 0, (value - chance) / np.where(most > 0, most, 1), np.nan)
        matrix = array(matrix)
        panels.append((label, matrix, "layer", "layer", one["layers"], one["layers"]))
    if not panels:
        return None
    return _panels(panels, len(panels), "(MI - chance) / (entropy - chance)", centre=None, limits=(0, 1))


def load(measured: Sequence[dict]) -> Any:
    """Loads as multiples of an equal share."""
    panels = [
        (label, array(measure["value"]) / array(measure["baseline"]), "expert", "layer",
         list(range(one["recording"]["experts"])), one["layers"])
        for label, one, measure in _having("load", measured)
    ]  # fmt: skip
    return _panels(panels, len(panels), "load / equal share", centre=1.0, limits=None) if panels else None


def coactivation(measured: Sequence[dict]) -> Any:
    """First, middle and last layer; as multiples of a random router's."""
    panels, columns = [], 1
    for label, one, measure in _having("coactivation", measured):
        if one["recording"]["topk"] < 2:
            continue
        picked = _few(len(one["layers"]))
        columns = len(picked)
        value, chance = array(measure["value"]), array(measure["baseline"])
        off = np.where(np.eye(value.shape[-1], dtype=bool), np.nan, value - np.broadcast_to(chance, value.shape))
        names = list(range(value.shape[-1]))
        panels += [(f"{label}, layer {one['layers'][i]}", off[i], "expert j", "expert i", names, names) for i in picked]
    return _panels(panels, columns, "P(j | i) - chance", centre=0.0, limits=None) if panels else None


def transitions(measured: Sequence[dict]) -> Any:
    """First and last pair of neighbouring layers; less the loads of the next layer."""
    panels, columns = [], 1
    for label, one, measure in _having("transitions", measured):
        value = array(measure["value"])
        if not len(value):
            continue
        picked = _few(len(value))
        columns = len(picked)
        names = list(range(value.shape[-1]))
        off, layers = value - np.broadcast_to(array(measure["baseline"]), value.shape), one["layers"]
        panels += [
            (f"{label}, layer {layers[i]} to {layers[i + 1]}", off[i], f"expert of layer {layers[i + 1]}",
             f"expert of layer {layers[i]}", names, names) for i in picked
        ]  # fmt: skip
    return _panels(panels, columns, "P(next | this) - chance", centre=0.0, limits=None) if panels else None


def domains(measured: Sequence[dict]) -> Any:
    """A row of panels a model, a panel a domain; less the layer's loads."""
    panels, columns = [], 1
    for label, one, measure in _having("domain_specialisation", measured):
        names = measure["coordinates"]["domain"][:DOMAINS]
        off = array(measure["value"]) - np.broadcast_to(array(measure["baseline"]), array(measure["value"]).shape)
        columns = max(columns, len(names))
        experts = list(range(off.shape[-1]))
        panels += [
            (f"{label}: {name}", off[i], "expert", "layer", experts, one["layers"]) for i, name in enumerate(names)
        ]
    return _panels(panels, columns, "share - chance", centre=0.0, limits=None) if panels else None


def paths(measured: Sequence[dict], most: int = 10) -> Any:
    """Bars of the commonest sequences of best experts, with a uniform random router's share of any."""
    found = [(i, *one) for i, one in enumerate(_having("paths", measured)) if len(one[1]["layers"]) > 1]
    if not found:
        return None
    made = style.figure(max(4.2 * len(found), 5.0), 3.8)
    for place, (number, label, one, measure) in enumerate(found, 1):
        ax = style.axes(made, 1, len(found), place)
        tops, shares = measure["value"]["top"][:most], array(measure["value"]["shares"][:most])
        ax.barh(
            range(len(tops)), 100 * shares, color=style.MODEL_COLOURS[number], label="share" if place == 1 else None
        )
        chance = 100 * one["recording"]["experts"] ** -float(len(one["layers"]))
        ax.axvline(chance, label=f"chance ({chance:.2g} %)" if place == 1 else None, **style.CHANCE)
        ax.set_yticks(range(len(tops)), [_short(path) for path in tops], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("tokens with this path (%)", fontsize=10)
        if place == 1:
            ax.set_ylabel("best expert of each layer", fontsize=10)
            handles = ax.get_legend_handles_labels()[0]
    made.legend(handles[:2], [one.get_label() for one in handles[:2]], loc="outside upper left", ncols=2,
        frameon=False, fontsize=9)  # fmt: skip
    return made


def _short(path: Sequence[int]) -> str:
    parts = ["null" if one < 0 else str(one) for one in path]
    return "-".join(parts if len(parts) <= 8 else [*parts[:4], "..", *parts[-3:]])


def _few(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})
