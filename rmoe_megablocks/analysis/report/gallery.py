"""Which figures there are, in the order in which they are told, with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rmoe_megablocks.analysis.report import curves, maps

_LINES = "One line a model over its layers. "


@dataclass(frozen=True)
class Entry:
    """A figure to be.

    Attributes:
        build: makes a Figure of measures of 1-4 models, or None where there is nothing to show.
        measure: that it shows.
        read: how to read it.
        chance: what chance would give, where the measure's own words do not say it; or what says it of the measures.
        wide: takes the whole width of the page.
    """

    name: str
    title: str
    section: str
    measure: str
    read: str
    build: Callable[[Sequence[dict]], Any]
    chance: str | Callable[[Sequence[dict]], str] | None = None
    wide: bool = False


def _layers(section: str, *names: str) -> list[Entry]:
    found = []
    for name in names:
        if name in curves.WITHIN:
            measure, (title, _, read) = curves.WITHIN[name][0], curves.WITHIN_TITLES[name]
            chance = {
                "domain_information": "the dashed line: domains shuffled among the windows",
                "transition_information": "the dashed line: layers that choose on their own, counted in as many tokens",
            }[name]
        else:
            measure, (title, _, read) = name, curves.BY_LAYER[name]
            chance = None
        found.append(Entry(name, title, section, measure, _LINES + read, partial(curves.by_layer, name), chance))
    return found


def entries() -> list[Entry]:
    """All figures, in order."""
    wide = partial(Entry, wide=True)
    return [
        wide("mutual_information", "Mutual information of layers", "Layers", "mutual_information",
            "What one layer's scores tell of another's, of each pair of layers: as measured, with tokens shuffled, and "
            "with chance taken off, as a share of the most that there can be. The diagonal is a layer with itself.",
            maps.information, _information),
        *_layers("Layers", "transition_information", "predictability"),
        wide("transitions", "From layer to layer", "Layers", "transitions",
            "Row i: where tokens of expert i go in the next layer, less what the next layer's loads alone give. Orange "
            "is more often than chance, purple less often, grey an expert that nobody chose.", maps.transitions,
            "0 everywhere, white: the mark on the colour bar"),
        wide("paths", "Commonest paths", "Layers", "paths",
            "The sequences of best experts that most tokens take, expert numbers from the first layer to the last.",
            maps.paths, "the dashed line: a uniform random router gives every path the share E to the power -L, of "
            "real and null experts"),
        *_layers("Gates", "entropy", "inside_balance", "outside_balance", "margin", "state_norm", "update_gate",
            "reset_gate"),
        wide("load", "Loads", "Loads", "load",
            "Each expert's share of a layer's choices, over an equal share. Orange is busier, purple idler.", maps.load,
            "1 everywhere, white: the mark on the colour bar"),
        *_layers("Loads", "max_violation_global", "max_violation_batch", "gini", "dead_experts"),
        wide("coverage", "Coverage", "Loads", "coverage",
            "The share of all choices that the N busiest experts of a layer have; the further above the dashed line, "
            "the more uneven.", curves.coverage, "the dashed line: equal loads"),
        wide("saturation", "Saturation over training", "Over training", "saturation",
            "The overlap of a checkpoint's choices with the last one's, which is 1 at the end.",
            partial(curves.over_training, "saturation")),
        wide("load_over_training", "MaxVio over training", "Over training", "load_over_training",
            "How much more than the mean the busiest expert of a layer has, less 1.",
            partial(curves.over_training, "load_over_training"), "0, the dashed line: equal loads"),
        wide("coactivation", "Who is chosen together", "Specialisation", "coactivation",
            "Where expert i was chosen, how often j was too, less a random router's share. The diagonal is left "
            "out, grey.",
            maps.coactivation, "0 everywhere, white: the mark on the colour bar"),
        wide("domain_specialisation", "Domains", "Specialisation", "domain_specialisation",
            "An expert's share of a domain's choices, less its share of all. Orange: the domain's tokens come here "
            f"more often. At most {maps.DOMAINS} domains are drawn; the CSV has all.", maps.domains,
            "0 everywhere, white: the mark on the colour bar"),
        *_layers("Specialisation", "domain_information"),
        wide("vocabulary_specialisation", "Token ids", "Specialisation", "vocabulary_specialisation",
            "Of an id's choices, the share of its K favourite experts, by the token read, the true next and the "
            "predicted next one. Rare ids look special by chance, so read the distance to the dashed "
            "line.", curves.vocabulary),
        *_layers("Weights", "expert_similarity", "router_similarity"),
    ]  # fmt: skip


def _information(measured: Sequence[dict]) -> str:
    """What chance gives, in numbers."""
    told = []
    for label, one in zip(curves.labels(measured), measured, strict=True):
        value, share = (one["figures"].get(f"mutual_information{name}") for name in ("", "_adjusted"))
        if value and share:
            numbers = [f"{n:.3f}" if n is not None else "no number" for n in (value["value"], value["chance"])]
            adjusted = "none is left" if share["value"] is None else f"{share['value']:.3f}"
            told.append(f"{label} {numbers[0]} nats, {numbers[1]} by chance, {adjusted} adjusted")
    return (
        "the panel in the middle: gates of this flatness have that much and share nothing. Adjusted it is 0, and 1 "
        f"of a copy. Means over pairs of different layers: {'; '.join(told)}"
    )


def caption(entry: Entry, measured: Sequence[dict]) -> dict[str, str]:
    """``read``, ``chance``, ``source`` and ``note`` of a figure that some model has."""
    having = [
        (label, one["measures"][entry.measure])
        for label, one in zip(curves.labels(measured), measured, strict=True)
        if entry.measure in one["measures"]
    ]
    chance = entry.chance(measured) if callable(entry.chance) else entry.chance
    if chance is None:
        known = _told(having, "baseline_is")
        chance = f"the dashed line ({known})" if known else "no closed form; compare models and layers"
    return {
        "read": entry.read,
        "chance": chance,
        "source": having[0][1].get("source") or "",
        "note": _told(having, "note"),
    }


def _told(having: Sequence[tuple[str, dict]], key: str) -> str:
    """What all measures say, or each model's where they say different things."""
    said = {label: measure.get(key) or "" for label, measure in having}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return " ".join(f"{label}: {words}" for label, words in said.items() if words)
