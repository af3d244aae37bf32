"""Runs as they lie in their folders: arguments.json, metrics.jsonl, summary.json."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rmoe_megablocks.data.prepared import metadata
from rmoe_megablocks.errors import UsageError

_FILES = ("arguments.json", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        arguments: every argument as it was parsed, by dest.
        records: the lines of metrics.jsonl; of an iteration that was done twice, after a kill, the later one.
        summary: summary.json.
    """

    folder: Path
    arguments: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.arguments["seed"]

    def figure(self, name: str) -> float | None:
        """A number of summary.json, None where the run has none; a partial one stands for the whole one."""
        value = self.summary.get(name, self.summary.get(f"{name}_partial"))
        return value if isinstance(value, int | float) else None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Its ``train`` or ``valid`` lines, by iteration."""
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def dataset(self) -> str:
        """The training text: a checksum of what dataset.json says of it, else the place it was read from."""
        paths = self.arguments.get("train_data_path") or self.arguments.get("data_path") or ["mock data"]
        described = Path(str(paths[0])).parent / metadata.FILE_NAME
        try:
            return hashlib.sha256(described.read_bytes()).hexdigest()[:12]
        except OSError:
            return " ".join(map(str, paths))

    @property
    def evaluated(self) -> str:
        """How many tokens of each split its figures stand for."""
        told = self.summary.get("evaluation", {})
        return ", ".join(f"{split} {told[split].get('tokens', 'none')}" for split in sorted(told))


def find_runs(places: Sequence[str]) -> list[Run]:
    """The runs in ``places``: folders of a run, folders of runs, and patterns of either.

    Raises:
        UsageError: a place without a run; one that is named itself and is unfinished or damaged.
    """
    folders: dict[Path, None] = {}
    for place in places:
        found = [Path(path) for path in sorted(glob.glob(place))]
        if not found:
            raise UsageError(f"{place}: there is no such folder")
        of_runs = [folder for path in found for folder in _runs_in(path)]
        if not of_runs:
            raise UsageError(f"{place}: no run in it (a run's folder has {', '.join(_FILES)})")
        folders |= dict.fromkeys(of_runs)
    return [read_run(folder) for folder in folders]


def _runs_in(path: Path) -> list[Path]:
    if (path / _FILES[0]).is_file():
        return [path]
    return sorted(child.parent for child in path.glob(f"*/{_FILES[0]}")) if path.is_dir() else []


def read_run(folder: Path) -> Run:
    """Raises UsageError, one line, for a run that is not finished, or a file that cannot be read."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder}: has no {missing[0]}: not a finished run (the same command again finishes it)")
    arguments, lines, summary = (_read(folder / name) for name in _FILES)
    seed, iterations = arguments[0].get("seed"), summary[0].get("iterations")
    try:
        records = {(line["kind"], line["iteration"]): line for line in lines}
        told = [records[key] for key in sorted(records) if key[1] <= iterations]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder}: its metrics.jsonl or summary.json lacks {error}") from None
    if not isinstance(seed, int):
        raise UsageError(f"{folder / _FILES[0]}: has no seed")
    if not any(record["kind"] == "train" for record in told):
        raise UsageError(f"{folder / _FILES[1]}: has no training iteration")
    return Run(folder, arguments[0], tuple(told), summary[0])


def _read(file: Path) -> list[dict[str, Any]]:
    """The object of a .json, the objects of a .jsonl."""
    try:
        text = file.read_text()
        found = [json.loads(part) for part in (text.splitlines() if file.suffix == ".jsonl" else [text])]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    if not all(isinstance(one, dict) for one in found):
        raise UsageError(f"{file}: is no record of a run (expected JSON objects)")
    return found
