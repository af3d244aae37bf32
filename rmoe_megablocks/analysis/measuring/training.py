"""Measures of several checkpoints of one run: how choices and loads came to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import choices, load
from rmoe_megablocks.analysis.measuring.entries import CLOSED, entry
from rmoe_megablocks.errors import UsageError


def over_training(recordings: Sequence[Any]) -> dict[str, Any]:
    """``saturation`` [steps, L] and ``load_over_training`` [steps, L, E], in the order of the steps.

    Args:
        recordings: of one run, of the same text, one a step; two at least.

    Raises:
        UsageError: recordings of other layers, experts or text, of one step twice, or of one step alone.
    """
    ordered = sorted(recordings, key=lambda one: one.about.iteration or 0)
    _check(ordered)
    last = ordered[-1].about
    layers, experts = len(last.layers), last.experts
    counts_SLE = np.zeros((len(ordered), layers, experts), np.int64)
    same_SL = np.zeros((len(ordered), layers), np.int64)
    made_L = np.zeros(layers, np.int64)
    for parts in _aligned(ordered):
        chosen_last = parts[-1]
        for step, chosen in enumerate(parts):
            for layer in range(layers):
                found, made = choices.same(chosen[:, layer], chosen_last[:, layer])
                same_SL[step, layer] += found
                counts_SLE[step, layer] += load.counts(chosen[:, layer], experts)
                made_L[layer] += made if step == 0 else 0
    steps = [one.about.iteration for one in ordered]
    return _entries(counts_SLE, same_SL, made_L, steps, ordered[0].about.tokens)


def _entries(counts_SLE: np.ndarray, same_SL: np.ndarray, made_L: np.ndarray, steps: list, tokens: int) -> dict:
    total = counts_SLE.sum(2, keepdims=True)
    shares = counts_SLE / np.where(total, total, np.nan)
    by_expert = {"step": steps}
    of_rows = lambda function: [[function(row) for row in step] for step in counts_SLE]  # noqa: E731
    # an expert is among a token's choices of either with probability counts / tokens
    by_chance = (counts_SLE * counts_SLE[-1:]).sum(2) / (tokens * np.where(made_L, made_L, np.nan))
    return {
        "saturation": entry(
            same_SL / np.where(made_L, made_L, np.nan), ["step", "layer"], "share",
            baseline=by_chance, baseline_is=f"{CLOSED}: both steps' loads, tokens shuffled",
            source="OLMoE (2409.02060): share of the last step's choices that a step had made",
            note="the last step has 1, being held against itself. Unequal loads alone give more than K/E.",
            coordinates=by_expert,
        ),
        "load_over_training": entry(
            shares, ["step", "layer", "expert"], "share", baseline=1 / counts_SLE.shape[2],
            baseline_is=f"{CLOSED}: uniform loads", source="share of a layer's choices, step by step",
            note="of this text, not of the training batches. `max_violation`, `gini`, `dead` are [steps, L].",
            coordinates=by_expert, max_violation=of_rows(load.max_violation), gini=of_rows(load.gini),
            dead=of_rows(lambda row: len(load.dead(row))),
        ),
    }  # fmt: skip


def _check(ordered: Sequence[Any]) -> None:
    if len(ordered) < 2:
        raise UsageError("over training: needs recordings of two steps or more of one run")
    last = ordered[-1].about
    steps = [one.about.iteration for one in ordered]
    for one in ordered:
        about = one.about
        if about.iteration is None:
            raise UsageError(f"{about.name}: the recording does not say of which iteration it is")
        if steps.count(about.iteration) > 1:
            raise UsageError(f"{about.name}: iteration {about.iteration} is given twice")
        for what in ("layers", "experts", "topk", "tokens", "seq_length"):
            if getattr(about, what) != getattr(last, what):
                raise UsageError(
                    f"{about.name}: has {what} {getattr(about, what)}, {last.name} {getattr(last, what)}: no two "
                    "steps of one run on one text"
                )


def _aligned(ordered: Sequence[Any]) -> Iterator[list[np.ndarray]]:
    """[T, L, K] of every recording, of the same rows; shards may end elsewhere.

    Raises:
        UsageError: another token in one of them.
    """
    streams = [one.batches(columns=["token", "choices"]) for one in ordered]
    rest = [(np.zeros(0, np.int32), None)] * len(ordered)
    row = 0
    while True:
        for place, stream in enumerate(streams):
            if not len(rest[place][0]):
                batch = next(stream, None)
                if batch is None:  # all have as many tokens, so that all are at their end
                    return
                rest[place] = (np.asarray(batch.token_T), np.asarray(batch.choices_TLK))
        rows = min(len(tokens) for tokens, _ in rest)
        for one, (tokens, _) in zip(ordered, rest, strict=True):
            if (other := np.flatnonzero(tokens[:rows] != rest[-1][0][:rows])).size:
                raise UsageError(
                    f"{one.about.name}: token {row + other[0]} is another one than in {ordered[-1].about.name}: "
                    "record all steps on one text"
                )
        yield [chosen[:rows] for _, chosen in rest]
        rest = [(tokens[rows:], chosen[rows:]) for tokens, chosen in rest]
        row += rows
