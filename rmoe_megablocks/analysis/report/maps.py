"""Figures of matrices: a panel a model (and layer), coloured by how far they are from chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmoe_megablocks.analysis.report import style
from rmoe_megablocks.analysis.report.curves import array, labels

#: most domains in a figure
DOMAINS = 6
#: most rows and columns of a matrix whose numbers are written into it
_WRITTEN = 6
_WIDE = 2.9  # inches of a panel


class Panel(NamedTuple):
    """A matrix and what stands around it; ``x`` and ``y``: what its columns and rows are, with a name for each."""

    title: str
    matrix: np.ndarray
    x: tuple[str, Sequence]
    y: tuple[str, Sequence]


class Colours(NamedTuple):
    """How numbers get colours: ``bar`` says what they are; around ``centre`` if there is one, else from low to high."""

    bar: str
    centre: float | None = None
    limits: tuple[float, float] | None = None

    def range(self, panels: Sequence[Panel]) -> tuple[float, float]:
        """Of all panels together; of numbers there may be none."""
        everything = np.concatenate([panel.matrix.reshape(-1) for panel in panels])
        finite = everything[np.isfinite(everything)]
        low, high = self.limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
        if self.centre is None:
            return float(low), float(high)
        reach = max(abs(high - self.centre), abs(low - self.centre), 1e-3)
        return self.centre - reach, self.centre + reach


def _panels(rows: Sequence[Sequence[Panel]], colours: Colours) -> Any:
    """A Figure with a row of panels a model, or all in one row where each has one; one colour bar."""
    if all(len(row) == 1 for row in rows):
        rows = [[panel for row in rows for panel in row]]
    made, axes = _grid(rows)
    _fill(made, [(ax, panel) for row in axes for ax, panel in row], colours)
    return made


def _grid(rows: Sequence[Sequence[Panel]], bars: int = 1) -> tuple[Any, list[list[tuple[Any, Panel]]]]:
    """A Figure with axes for each row's panels; a shorter row leaves its end empty."""
    columns = max(len(row) for row in rows)
    made = style.figure(max(_WIDE * columns + bars, 4.4), _WIDE * len(rows) + 0.3)
    axes = [
        [(made.add_subplot(len(rows), columns, number * columns + place), panel) for place, panel in enumerate(row, 1)]
        for number, row in enumerate(rows)
    ]
    return made, axes


def _fill(made: Any, axes: Sequence[tuple[Any, Panel]], colours: Colours, written: Callable | None = None) -> None:
    """Draws panels with one colour bar; ``written``: how small matrices' numbers are written into them."""
    low, high = colours.range([panel for _, panel in axes])
    shown = None
    for ax, (title, matrix, x, y) in axes:
        shown = ax.imshow(
            np.ma.masked_invalid(matrix), "viridis" if colours.centre is None else "PuOr_r", vmin=low, vmax=high,
            aspect="equal" if matrix.shape[0] == matrix.shape[1] else "auto", interpolation="nearest",
        )  # fmt: skip
        ax.set_facecolor("#cccccc")
        ax.set_title(title, fontsize=9.5)
        for axis, (label, names) in ((ax.xaxis, x), (ax.yaxis, y)):
            axis.set_label_text(label, fontsize=9)
            step = -(-len(names) // 8)
            axis.set_ticks(range(0, len(names), step), [str(one) for one in names[::step]], fontsize=8)
        if written and max(matrix.shape) <= _WRITTEN:
            for (row, column), value in np.ndenumerate(matrix):
                dark = (value - low) / max(high - low, 1e-9) < 0.6
                ax.text(column, row, written(value), ha="center", va="center", fontsize=8,
                    color="white" if dark else "black")  # fmt: skip
    bar = made.colorbar(shown, ax=[ax for ax, _ in axes], fraction=0.05)
    bar.set_label(colours.bar, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if colours.centre is not None:
        bar.ax.axhline(colours.centre, color="#111111", linewidth=1.5)


def _having(name: str, measured: Sequence[dict]) -> list[tuple[str, dict, dict]]:
    return [
        (label, one, one["measures"][name])
        for label, one in zip(labels(measured), measured, strict=True)
        if name in one["measures"]
    ]


def information(measured: Sequence[dict]) -> Any:
    """Mutual information of layers, what it is with tokens shuffled, and adjusted: 0 by chance, 1 of a copy. A row a
    model; None of one layer."""
    rows = []
    for label, one, measure in _having("mutual_information", measured):
        layers = one["layers"]
        if len(layers) > 1:
            what = {"value": "as measured", "baseline": "by chance", "adjusted": "adjusted"}
            rows.append(
                [
                    Panel(f"{label}, {title}", array(measure[key]), ("layer", layers), ("layer", layers))
                    for key, title in what.items()
                ]
            )
    if not rows:
        return None
    made, axes = _grid(rows, bars=2)
    nats = [pair for row in axes for pair in row[:2]]
    most = max(float(np.nanmax(panel.matrix)) for _, panel in nats)
    _fill(made, nats, Colours("mutual information (nats)", limits=(0, most)), "{:.2f}".format)
    shares = [row[2] for row in axes]
    _fill(made, shares, Colours("(MI - chance) / (entropy - chance)", limits=(0, 1)), _share)
    return made


def _share(value: float) -> str:
    """Three digits behind the point, without what all have."""
    return f"{value:.3f}".replace("0.", ".", 1) if np.isfinite(value) else ""


def load(measured: Sequence[dict]) -> Any:
    """Loads as multiples of an equal share."""
    rows = [
        [Panel(label, array(measure["value"]) / array(measure["baseline"]), _experts(one), ("layer", one["layers"]))]
        for label, one, measure in _having("load", measured)
    ]
    return _panels(rows, Colours("load / equal share", centre=1.0)) if rows else None


def coactivation(measured: Sequence[dict]) -> Any:
    """First, middle and last layer; less a random router's share."""
    rows = []
    for label, one, measure in _having("coactivation", measured):
        if one["recording"]["topk"] < 2:
            continue
        value, chance = array(measure["value"]), array(measure["baseline"])
        off = np.where(np.eye(value.shape[-1], dtype=bool), np.nan, value - np.broadcast_to(chance, value.shape))
        rows.append(
            [
                Panel(
                    f"{label}, layer {one['layers'][i]}", off[i], _experts(one, "expert j"), _experts(one, "expert i")
                )
                for i in _few(len(one["layers"]))
            ]
        )
    return _panels(rows, Colours("P(j | i) - chance", centre=0.0)) if rows else None


def transitions(measured: Sequence[dict]) -> Any:
    """First, middle and last pair of neighbouring layers; less the loads of the next layer."""
    rows = []
    for label, one, measure in _having("transitions", measured):
        value, layers = array(measure["value"]), one["layers"]
        off = value - np.broadcast_to(array(measure["baseline"]), value.shape)
        rows.append(
            [
                Panel(
                    f"{label}, layer {layers[i]} to {layers[i + 1]}", off[i],
                    _experts(one, f"expert of layer {layers[i + 1]}"), _experts(one, f"expert of layer {layers[i]}"),
                )
                for i in _few(len(value))
            ]
        )  # fmt: skip
    return _panels(rows, Colours("P(next | this) - chance", centre=0.0)) if rows else None


def domains(measured: Sequence[dict]) -> Any:
    """A row of panels a model, a panel a domain; less the layer's loads."""
    rows = []
    for label, one, measure in _having("domain_specialisation", measured):
        names = measure["coordinates"]["domain"][:DOMAINS]
        off = array(measure["value"]) - np.broadcast_to(array(measure["baseline"]), array(measure["value"]).shape)
        rows.append(
            [Panel(f"{label}: {name}", off[i], _experts(one), ("layer", one["layers"])) for i, name in enumerate(names)]
        )
    return _panels(rows, Colours("share - chance", centre=0.0)) if rows else None


def paths(measured: Sequence[dict], most: int = 10) -> Any:
    """Bars of the commonest sequences of best experts, with a uniform random router's share of any."""
    found = [(i, *one) for i, one in enumerate(_having("paths", measured))]
    if not found:
        return None
    made = style.figure(max(4.2 * len(found), 5.0), 3.8)
    for place, (number, label, one, measure) in enumerate(found, 1):
        ax = style.axes(made, 1, len(found), place)
        tops, shares = measure["value"]["top"][:most], array(measure["value"]["shares"][:most])
        ax.barh(range(len(tops)), 100 * shares, color=style.MODEL_COLOURS[number])
        about = one["recording"]
        chance = 100 * (about["experts"] + about["null_experts"]) ** -float(len(one["layers"]))
        line = ax.axvline(chance, **style.CHANCE)
        ax.set_yticks(range(len(tops)), [_short(path) for path in tops], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(f"{label}, chance {chance:.2g} %", fontsize=10)
        ax.set_xlabel("tokens with this path (%)", fontsize=10)
        if place == 1:
            ax.set_ylabel("best expert of each layer", fontsize=10)
    made.legend([line], ["chance"], loc="outside upper left", frameon=False, fontsize=9)
    return made


def _short(path: Sequence[int]) -> str:
    parts = ["null" if one < 0 else str(one) for one in path]
    return "-".join(parts if len(parts) <= 8 else [*parts[:4], "..", *parts[-3:]])


def _experts(one: dict, label: str = "expert") -> tuple[str, list[int]]:
    return label, list(range(one["recording"]["experts"]))


def _few(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})
