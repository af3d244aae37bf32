"""The second pass over a recording: its rows in pieces that each lie in one block of the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measuring.options import Options
from rmoe_megablocks.analysis.measuring.passes.survey import KINDS, Survey
from rmoe_megablocks.errors import UsageError

_SCORES = 2**21  # of a piece at most, and so the size of what is computed of them


def chunk(layers: int, experts: int) -> int:
    """Tokens of a piece: 4096, of wide models fewer."""
    return max(64, min(4096, _SCORES // (layers * experts)))


@dataclass
class Piece:
    """Neighbouring rows of one block.

    Attributes:
        start, stop: rows of the recording.
        block: of the text.
        choices_TLK: int64, -1 where none.
        half_TLE: float16 scores as recorded.
        scores_TLE: float32; sigmoid scores, and softmaxes over null experts too, over the sum of the real
            experts', so that every layer is a distribution.
        ids: by kind, [T] token ids.
        domain_T, shuffled_domain_T: places in the survey's ``domains``.
        columns: what else there is a token and layer, float32 [T, L]: margin, state_norm, update_gate, reset_gate.
    """

    start: int
    stop: int
    block: int
    choices_TLK: np.ndarray
    half_TLE: np.ndarray
    scores_TLE: np.ndarray
    domain_T: np.ndarray
    shuffled_domain_T: np.ndarray
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)


def pieces(recording: Any, found: Survey, options: Options) -> Iterator[Piece]:
    """The second pass: all rows, cut where a block ends, a batch of ``options.batch_tokens``, or a chunk.

    Raises:
        UsageError: a score that is not a number from 0 to 1, or a choice that is no expert's number.
    """
    ends = found.starts_U[np.flatnonzero(np.diff(found.block_U)) + 1]
    start = 0
    for batch in recording.batches():
        stop = start + len(batch.token_T)
        cuts = {start, stop}
        cuts |= set(ends[(ends > start) & (ends < stop)].tolist())
        for size in (chunk(len(recording.about.layers), recording.about.experts), options.batch_tokens):
            cuts |= set(range(-(-start // size) * size, stop, size)) - {start}
        ordered = sorted(cuts)
        for low, high in zip(ordered, ordered[1:], strict=False):
            yield _piece(recording.about, batch, found, start, low, high)
        start = stop


def _piece(about: Any, batch: Any, found: Survey, offset: int, start: int, stop: int) -> Piece:
    part = slice(start - offset, stop - offset)
    units = found.units(start, stop)
    choices = np.asarray(batch.choices_TLK[part]).astype(np.int64)
    half = np.ascontiguousarray(batch.scores_TLE[part], np.float16)
    _check_values(about, half, choices, start)
    scores = half.astype(np.float32)
    if about.score_function == "sigmoid" or about.null_experts:
        total = scores.sum(-1, keepdims=True)
        scores /= np.where(total > 0, total, 1)
    return Piece(
        start,
        stop,
        int(found.block_U[units[0]]),
        choices,
        half,
        scores,
        found.domain_U[units],
        found.shuffled_domain_U[units],
        {kind: getattr(batch, name)[part] for kind, name in KINDS.items() if getattr(batch, name, None) is not None},
        {
            name: np.asarray(getattr(batch, f"{name}_TL")[part])
            for name in ("margin", "state_norm", "update_gate", "reset_gate")
            if getattr(batch, f"{name}_TL", None) is not None
        },
    )


_LARGEST_HALF = np.float16(1.0).view(np.uint16)


def _check_values(about: Any, half: np.ndarray, choices: np.ndarray, start: int) -> None:
    # as bits: of the halves from 0 to 1, and of them alone, none is above that of 1 (NaN, infinity and below 0 are)
    if half.size and (half.view(np.uint16) > _LARGEST_HALF).any():
        negative_zero = half.view(np.uint16) == 0x8000
        bad = (half.view(np.uint16) > _LARGEST_HALF) & ~negative_zero
        if bad.any():
            token, layer, expert = np.argwhere(bad)[0]
            raise UsageError(
                f"{about.name}: token {start + token}, layer {about.layers[layer]}: the score of expert {expert} is "
                f"{half[token, layer, expert]}, not a number from 0 to 1: record it again"
            )
    if choices.size and (choices.min() < -1 or choices.max() >= about.experts):
        token, layer, _ = np.argwhere((choices < -1) | (choices >= about.experts))[0]
        raise UsageError(
            f"{about.name}: token {start + token}, layer {about.layers[layer]}: chose {choices[token, layer].tolist()} "
            f"of {about.experts} experts: record it again"
        )
