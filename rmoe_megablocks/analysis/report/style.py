"""How the figures look: the palette of Okabe and Ito, which people with colour blindness tell apart."""

from __future__ import annotations

from typing import Any

MODEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499")
MODEL_MARKERS = ("o", "s", "^", "D")
CHANCE = {"color": "#444444", "linestyle": (0, (4, 3)), "linewidth": 1.2}
SIZE = (5.0, 3.3)


def figure(width: float = SIZE[0], height: float = SIZE[1]) -> Any:
    """A matplotlib Figure without pyplot, whose state is the process's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def axes(made: Any, *place: int) -> Any:
    """An Axes with a light grid, its texts in at least 9 points."""
    ax = made.add_subplot(*(place or (1, 1, 1)))
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=9)
    return ax


def whole_ticks(axis: Any, numbers: list[int], most: int = 12) -> None:
    """Ticks at some of ``numbers``, which are whole."""
    step = -(-len(numbers) // most)
    axis.set_ticks(numbers[::step], [str(one) for one in numbers[::step]])


def legend(made: Any, ax: Any) -> None:
    """Above the plot, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    columns = 2 if max((len(one) for one in labels), default=0) > 16 else 3
    made.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def legends(made: Any) -> None:
    """One for all plots of a figure where all show the same; else each has its own."""
    said = [ax.get_legend_handles_labels()[1] for ax in made.axes]
    if all(one == said[0] for one in said):
        legend(made, made.axes[0])
        return
    for ax in made.axes:
        ax.legend(frameon=False, fontsize=8)
