"""measures.json and a table a measure."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmoe_megablocks.errors import UsageError

FILE = "measures.json"
_ENTRY = ("value", "axes", "unit", "baseline", "baseline_is", "source", "note", "coordinates")


def write(measured: Mapping[str, Any], folder: Path) -> list[Path]:
    """Leaves measures.json and one CSV a measure in ``folder``, which is made. Returns what was written.

    A row of a CSV is one number: its place on each axis, value and baseline (empty where there is none), and what else
    the measure has of this place, as ``adjusted`` of the mutual information and ``sd`` of a mean.

    Raises:
        UsageError: a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(measured, indent=None, separators=(",", ":"), allow_nan=False)
        written = [_whole(folder / FILE, text)]
        for name, measure in measured["measures"].items():
            lines = _Lines()
            writer = csv.writer(lines, lineterminator="\n")
            more = _more(measure)
            writer.writerow([*(measure["axes"] or ["name", "place"]), "value", "baseline", *more])
            writer.writerows(_rows(measure, measured["layers"], more))
            written.append(_whole(folder / f"{name}.csv", "".join(lines.parts)))
    except OSError as error:
        raise UsageError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None
    return written


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` left in a folder, or the file itself.

    Raises:
        UsageError: no such file, or another one.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(found, dict) or found.get("format") != 1 or not {"measures", "figures"} <= found.keys():
        raise UsageError(f"{file}: is no measures.json of format 1: measure the recording again")
    return found


class _Lines:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> None:
        self.parts.append(text)


def _whole(path: Path, text: str) -> Path:
    """Written beside and put in place: nobody reads half a file."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _more(measure: Mapping[str, Any]) -> list[str]:
    """Names of what a measure has beside its value, of the same shape."""
    if not measure["axes"]:
        return []
    return [name for name, one in measure.items() if name not in _ENTRY and _shape(one) == _shape(measure["value"])]


def _shape(value: Any) -> list[int]:
    """Of nested lists, which have no other lengths further on: of numbers, or None."""
    shape = []
    while isinstance(value, list) and value:
        if len({len(one) if isinstance(one, list) else -1 for one in value}) > 1:
            return [-1]
        shape.append(len(value))
        value = value[0]
    return [*shape, 0] if isinstance(value, list) else shape


def _rows(measure: Mapping[str, Any], layers: list[int], more: list[str]) -> Iterator[list]:
    if not measure["axes"]:
        for name, value in measure["value"].items():
            for place, one in enumerate(value) if isinstance(value, list) else [("", value)]:
                shown = " ".join(map(str, one)) if isinstance(one, list) else one
                yield [name, place, shown, (measure["baseline"] or {}).get(name)]
        return
    shape = [*_shape(measure["value"]), *[0] * len(measure["axes"])][: len(measure["axes"])]
    names = [_names(axis, size, measure, layers) for axis, size in zip(measure["axes"], shape, strict=True)]
    for place in itertools.product(*map(range, shape)):
        found = [_at(measure[name], place) for name in ("value", "baseline", *more)]
        yield [*(row[step] for row, step in zip(names, place, strict=True)), *found]


def _at(value: Any, place: tuple[int, ...]) -> Any:
    """One number of nested lists, or the number that stands for all."""
    for step in place if isinstance(value, list) else ():
        value = value[step]
    return value


def _names(axis: str, size: int, measure: Mapping[str, Any], layers: list[int]) -> list:
    if axis in measure["coordinates"]:
        return list(measure["coordinates"][axis])
    return layers[:size] if axis in ("layer", "other_layer") else list(range(size))
