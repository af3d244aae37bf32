"""The tokens that the page shows: pieces of windows of every domain, spread evenly over the text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

#: longest piece of a window
PIECE = 512
_OF_LAYERS = ("margin", "state_norm", "update_gate", "reset_gate")


def bytes_a_token(about: Any) -> int:
    """Bytes that a token takes on the page before base64: scores float16, choices int16, four numbers a layer."""
    layers = len(about.layers)
    return 12 + layers * (2 * about.experts + 2 * about.topk + 4 * len(_OF_LAYERS))


def sample(recording: Any, tokens: int) -> dict[str, Any]:
    """About ``tokens`` tokens for the page, JSON-ready; at least one of every domain.

    Returns:
        ``pieces`` (domain, window, first row, number of rows), ``token``, ``next``, ``predicted`` (ids), ``texts`` (by
        id), and arrays in base64, little-endian: ``choices`` int16 [T, L, K], ``scores`` float16 [T, L, E] and
        float32 [T, L] of margin, state norm and gates, null where the recording has none.
    """
    wanted = _pieces(recording, tokens)
    parts: dict[int, list[Any]] = {window: [] for window in wanted}
    for batch in recording.batches():
        for window in set(np.unique(batch.window_T).tolist()) & wanted.keys():
            room = wanted[window][1] - sum(len(part["token_T"]) for part in parts[window])
            rows = np.flatnonzero(batch.window_T == window)[: max(room, 0)]
            if len(rows):
                parts[window].append({k: v[rows] for k, v in vars(batch).items() if v is not None})
    pieces, all_parts, start = [], [], 0
    for window in sorted(wanted, key=lambda one: (wanted[one][2], one)):
        count = sum(len(part["token_T"]) for part in parts[window])
        pieces.append({"domain": wanted[window][0], "window": int(window), "start": start, "count": count})
        all_parts += parts[window]
        start += count
    arrays = {name: np.concatenate([part[name] for part in all_parts]) for name in all_parts[0]}
    ids = {name: arrays[f"{name}_T"].tolist() for name in ("token", "predicted")} | {
        "next": arrays["next_token_T"].tolist()
    }
    about, used = recording.about, set().union(*ids.values())
    return {
        "name": about.name,
        "layers": list(about.layers),
        "experts": about.experts,
        "topk": about.topk,
        "nulls": about.null_experts,
        "score": about.score_function,
        "pieces": pieces,
        **ids,
        "texts": {str(one): recording.vocabulary[one] for one in sorted(used) if one in recording.vocabulary},
        "choices": _packed(arrays["choices_TLK"], "<i2"),
        "scores": _packed(arrays["scores_TLE"], "<f2"),
        **{name: _packed(arrays.get(f"{name}_TL"), "<f4") for name in _OF_LAYERS},
    }


def _pieces(recording: Any, tokens: int) -> dict[int, tuple[str, int, int]]:
    """By window: domain, number of rows to take, place of the domain."""
    windows: dict[str, dict[int, int]] = {}
    for batch in recording.batches(["window", "domain"]):
        for domain in np.unique(batch.domain_T):
            numbers, counts = np.unique(batch.window_T[batch.domain_T == domain], return_counts=True)
            known = windows.setdefault(str(domain), {})
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                known[number] = known.get(number, 0) + count
    share = max(tokens // len(windows), 1)
    found = {}
    for place, (domain, known) in enumerate(windows.items()):
        numbers = sorted(known)
        rows = min(PIECE, share, max(known.values()))
        for number in _spread(numbers, max(share // rows, 1)):
            found[number] = (domain, min(rows, known[number]), place)
    return found


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    places = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int))
    return [numbers[place] for place in places]


def _packed(array: np.ndarray | None, dtype: str) -> str | None:
    return None if array is None else base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()
