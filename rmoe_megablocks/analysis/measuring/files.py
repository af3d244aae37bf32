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


def write(measured: Mapping[str, Any], folder: Path) -> list[Path]:
    """Leaves measures.json and one CSV a measure in ``folder``, which is made. Returns what was written.

    A row of a CSV is one number: its place on each axis, value and baseline (empty where there is none).

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
            writer.writerow([*(measure["axes"] or ["name", "place"]), "value", "baseline"])
            writer.writerows(_rows(measure, measured["layers"]))
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


def _rows(measure: Mapping[str, Any], layers: list[int]) -> Iterator[list]:
    if not measure["axes"]:
        for name, value in measure["value"].items():
            for place, one in enumerate(value) if isinstance(value, list) else [("", value)]:
                shown = " ".join(map(str, one)) if isinstance(one, list) else one
                yield [name, place, shown, (measure["baseline"] or {}).get(name)]
        return
    shape, value = [], measure["value"]
    for _ in measure["axes"]:
        shape.append(len(value))
        value = value[0] if value else []
    names = [_names(axis, size, measure, layers) for axis, size in zip(measure["axes"], shape, strict=True)]
    for place in itertools.product(*map(range, shape)):
        value, baseline = measure["value"], measure["baseline"]
        for step in place:
            value = value[step]
        if isinstance(baseline, list):
            for step in place:
                baseline = baseline[step]
        yield [*(row[step] for row, step in zip(names, place, strict=True)), value, baseline]


def _names(axis: str, size: int, measure: Mapping[str, Any], layers: list[int]) -> list:
    if axis in measure["coordinates"]:
        return list(measure["coordinates"][axis])
    return layers[:size] if axis in ("layer", "other_layer") else list(range(size))
