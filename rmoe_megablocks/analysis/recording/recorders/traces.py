"""Megatron-Core's routing trace (``--moe-routing-trace-path``, core/transformer/moe/router_trace.py), both ways.

A line is one layer's choices in one step: ``step``, ``stage`` "pre_dispatch", ``block`` "decoder" or "mtp", ``layer``
(from 0, of its pipeline stage), ``rank``, ``num_tokens``, ``topk`` and ``top_indices`` [num_tokens][topk]; with
``--moe-routing-trace-capture-logits`` also the place of its logits in ``logits_rankR.bin`` (bfloat16).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.analysis.recording.reading import Recording
from rmoe_megablocks.analysis.recording.writing import Writer
from rmoe_megablocks.errors import UsageError

_STAGE, _BLOCK = "pre_dispatch", "decoder"
_NEEDED = ("step", "block", "layer", "rank", "num_tokens", "topk", "top_indices")


def write(recording: Recording, path: Path) -> None:
    """The recording as rank 0's trace, a step a window; experts in the order of their numbers, as Megatron's maps give.

    Raises:
        UsageError: ``path`` is there already or cannot be written; a token chose fewer than K experts, as beside null
            ones, which a trace has no word for.
    """
    if path.exists():
        raise UsageError(f"--write-trace {path}: the file is there already")
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("w") as file:
            for window, choices_TLK in _windows(recording):
                if (choices_TLK < 0).any():
                    raise UsageError(
                        f"--write-trace: in window {window} a token chose fewer than {recording.about.topk} experts, "
                        "which a trace cannot say"
                    )
                for place, layer in enumerate(recording.about.layers):
                    file.write(json.dumps(_line(window, layer, np.sort(choices_TLK[:, place], axis=-1))) + "\n")
        beside.replace(path)
    except OSError as error:
        raise UsageError(f"--write-trace {path} cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _line(step: int, layer: int, choices_TK: np.ndarray) -> dict[str, Any]:
    return {
        "step": step,
        "stage": _STAGE,
        "block": _BLOCK,
        "layer": layer - 1,
        "rank": 0,
        "num_tokens": choices_TK.shape[0],
        "topk": choices_TK.shape[1],
        "top_indices": choices_TK.tolist(),
    }


def _windows(recording: Recording) -> Iterator[tuple[int, np.ndarray]]:
    number, pieces = None, []
    for batch in recording.batches(columns=["window", "choices"]):
        cuts = np.flatnonzero(np.diff(batch.window_T)) + 1
        for piece, windows in zip(
            np.split(batch.choices_TLK, cuts), np.split(batch.window_T, cuts), strict=True
        ):  # one window each
            if number is not None and windows[0] != number:
                yield number, np.concatenate(pieces)
                pieces = []
            number = int(windows[0])
            pieces.append(piece)
    if number is not None:
        yield number, np.concatenate(pieces)


def read(path: Path, name: str, target: Path, tokens: int | None = None) -> None:
    """Records a rank's trace with its logits: a step is a window; which tokens they were a trace does not say (-1).

    Layers of multi-token prediction are left out. ``tokens``: the first ones alone, in whole steps.

    Raises:
        UsageError: damaged, of no layer, without logits, steps of other layers than the first one's.
    """
    steps = _steps(path)
    first = next(steps, None)
    if first is None:
        raise UsageError(f"{path} is empty: nothing was traced")
    layers, topk = sorted(first), first[min(first)]["topk"]
    logits = _Logits(path, first)
    about = About(
        name=name,
        model=str(path),
        router_type="unknown",
        recurrent=False,
        layers=[layer + 1 for layer in layers],
        experts=logits.experts,
        topk=topk,
        data=[{"label": name, "name": path.name, "tokens": 0, "sha256": ""}],
        config={"read_from": "routing trace"},
    )
    with Writer(target, about) as writer:
        done, window, step = 0, 0, first
        while step is not None and (tokens is None or done < tokens):
            size = _write_step(writer, path, step, layers, logits, window, name)
            done, window = done + size, window + 1
            writer.about.seq_length = max(writer.about.seq_length, size)
            step = next(steps, None)
        writer.about.data[0]["tokens"] = done
        writer.finish()


def _write_step(writer: Writer, path: Path, step: dict, layers: list[int], logits: _Logits, window: int, name) -> int:
    number = step[min(step)]["step"]
    if sorted(step) != layers:
        raise UsageError(f"{path}: step {number} has layers {sorted(step)}, the first one {layers}")
    sizes = {record["num_tokens"] for record in step.values()}
    if len(sizes) != 1:
        raise UsageError(f"{path}: step {number} has other tokens in other layers: {sorted(sizes)}")
    (size,) = sizes
    topk, experts = writer.about.topk, writer.about.experts
    choices, scores, margins = [], [], []
    for layer in layers:
        record = step[layer]
        chosen_TK = np.asarray(record["top_indices"])
        if chosen_TK.shape != (size, topk) or chosen_TK.min() < 0 or chosen_TK.max() >= experts:
            raise UsageError(f"{path}: step {number}, layer {layer}: top_indices are not {topk} of {experts} experts")
        logits_TE = logits.of(record)
        selected_TK = np.take_along_axis(logits_TE, chosen_TK, axis=1)
        choices.append(np.take_along_axis(chosen_TK, np.argsort(-selected_TK, axis=1, kind="stable"), axis=1))
        powers = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
        scores.append(powers / powers.sum(1, keepdims=True))
        others_TE = logits_TE.copy()
        np.put_along_axis(others_TE, chosen_TK, -np.inf, axis=1)
        margins.append(selected_TK.min(1) - others_TE.max(1) if topk < experts else np.full(size, np.nan))
    writer.write(
        token_T=np.full(size, -1),
        next_token_T=np.full(size, -1),
        position_T=np.arange(size),
        window_T=np.full(size, window),
        domain_T=np.full(size, name),
        choices_TLK=np.stack(choices, 1),
        scores_TLE=np.stack(scores, 1),
        margin_TL=np.stack(margins, 1),
    )
    return size


class _Logits:
    """``logits_rankR.bin`` beside a trace. Raises UsageError where a record has no place in it."""

    def __init__(self, path: Path, first: dict[int, dict]) -> None:
        record = first[min(first)]
        if "logit_shape" not in record:
            raise UsageError(
                f"{path} has choices alone: trace with --moe-routing-trace-capture-logits for scores, or record the "
                "checkpoint (rmoe analyze CHECKPOINT), which every router type can be"
            )
        self._trace, self._file = path, path.parent / f"logits_rank{record['rank']}.bin"
        self.experts = int(record["logit_shape"][1])

    def of(self, record: dict) -> np.ndarray:
        """[T, E] float32 of a record."""
        shape, start, size = (record.get(key) for key in ("logit_shape", "logit_offset", "logit_bytes"))
        wanted = [record["num_tokens"], self.experts]
        try:
            if shape != wanted or size != 2 * wanted[0] * wanted[1]:
                raise ValueError(f"its shape is {shape}, expected {wanted}")
            bits = np.fromfile(self._file, "<u2", count=size // 2, offset=start)
            if len(bits) != size // 2:
                raise ValueError("it ends before")
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{self._file} has no logits for step {record['step']}, layer {record['layer']} of {self._trace.name} "
                f"({error})"
            ) from None
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(wanted)  # bfloat16 is float32's upper half


def _steps(path: Path) -> Iterator[dict[int, dict]]:
    """The records of each step by layer, in the order of the file. Raises UsageError for a damaged line."""
    current: dict[int, dict] = {}
    number = None
    with path.open("rb") as file:
        for place, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                missing = [key for key in _NEEDED if key not in record]
                if missing:
                    raise ValueError(f"it has no {missing[0]}")
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path}, line {place}: not a record of a routing trace ({error})") from None
            if record["block"] != _BLOCK:
                continue
            # a training step has several micro-batches, which come one behind the other
            if current and (record["step"] != number or record["layer"] in current):
                yield current
                current = {}
            number = record["step"]
            current[record["layer"]] = record
    if current:
        yield current
