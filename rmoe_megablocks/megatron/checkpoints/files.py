"""Checkpoints as they lie on disk, and which of them a restart loads. Only the file system: no torch, no Megatron.

What makes this decidable is the manifest that Megatron writes with ``--verify-integrity``, the last file of a
checkpoint: a checkpoint is complete if it has one and the files that it lists. Ours carries two more entries (see
:func:`seal`): the place of this save in the order of all saves in the folder, since after a roll-back the highest
iteration is not the latest and modification times do not survive copying; and a checksum of the manifest itself.
"""

import contextlib
import enum
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rmoe_megablocks.errors import UsageError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "integrity.json"
CONFIG = "metadata.json"  # the last file of a checkpoint without a manifest


class State(enum.Enum):
    """What is known of a checkpoint without reading its data."""

    COMPLETE = "complete"
    UNVERIFIED = "saved without --verify-integrity"
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged"
    MISSING = "missing"


@dataclass(frozen=True)
class Checkpoint:
    """One ``iter_NNNNNNN`` folder. ``number`` counts the saves of the folder above, 0 where that is unknown."""

    folder: Path
    iteration: int
    state: State
    problem: str = ""
    number: int = 0


@dataclass(frozen=True)
class Choice:
    """What a run starts from: ``iteration`` of ``folder``, or the beginning (None). ``note`` tells the user."""

    folder: Path
    iteration: int | None
    note: str | None


def write_atomically(path: Path, text: str) -> None:
    """A process killed at any moment leaves the old file or the new one, never a part."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:  # as of a full disk, which needs the room
        error.filename = str(path)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def seal(folder: Path, manifest: dict) -> None:
    """Writes ``manifest`` as the newest of all in the folder above; from here on the checkpoint counts as complete."""
    others = (_number(path) for path in folder.parent.glob(f"iter_*/{MANIFEST}"))
    manifest = manifest | {"save": 1 + max(others, default=0)}
    manifest["checksum"] = _checksum(manifest)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2))


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a checkpoint, None if it has none. Raises ValueError if it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not (isinstance(files, dict) and files and isinstance(manifest.get("algorithm"), str)):
        raise ValueError("not a manifest")
    if "checksum" in manifest and manifest["checksum"] != _checksum(manifest):
        raise ValueError("checksum")
    return manifest


def _checksum(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _number(path: Path) -> int:
    try:
        with _readable(path):
            manifest = read_manifest(path.parent)
    except ValueError:
        return 0
    return manifest.get("save", 0) if manifest else 0  # 0: written by Megatron alone


def inspect(folder: Path, iteration: int) -> Checkpoint:
    """Looks at one checkpoint without reading its data. Raises UsageError where the file system does not let it."""
    path = folder / f"iter_{iteration:07d}"
    with _readable(path):
        return _inspect(path, iteration)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Unreadable is neither missing nor damaged: an older checkpoint would be taken for the newest."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read ({error.strerror or error})") from error


def _inspect(path: Path, iteration: int) -> Checkpoint:
    try:
        present = {entry.name for entry in os.scandir(path)}
    except (FileNotFoundError, NotADirectoryError):
        return Checkpoint(path, iteration, State.MISSING, "it does not exist")
    try:
        manifest = read_manifest(path)
    except ValueError:
        return Checkpoint(path, iteration, State.DAMAGED, f"{MANIFEST} is damaged")
    if manifest is None:
        if CONFIG in present or any(name.startswith("mp_rank_") for name in present):
            return Checkpoint(path, iteration, State.UNVERIFIED, f"it has no {MANIFEST}")
        return Checkpoint(path, iteration, State.INCOMPLETE, f"it has no {CONFIG}: it was not saved to the end")
    number = manifest.get("save", 0)
    if missing := sorted(manifest["files"].keys() - present):
        return Checkpoint(path, iteration, State.DAMAGED, f"{listed(missing)} missing", number)
    if CONFIG in present:  # tiny, and Megatron needs it before it verifies anything
        digest = hashlib.sha256((path / CONFIG).read_bytes()).hexdigest()
        if manifest["files"].get(CONFIG) != digest:
            return Checkpoint(path, iteration, State.DAMAGED, f"{CONFIG} is damaged", number)
    return Checkpoint(path, iteration, State.COMPLETE, "", number)


def listed(names: list[str]) -> str:
    """A few names in words: "a is", "a and b are", "a, b and 3 others are"."""
    if len(names) == 1:
        return f"{names[0]} is"
    shown = names[:3] if len(names) > 4 else names
    last = f"{len(names) - 3} others" if len(names) > 4 else shown.pop()
    return f"{', '.join(shown)} and {last} are"


def iterations(folder: Path) -> list[int]:
    """Iterations of which ``folder`` has a checkpoint, in whatever state."""
    names = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*"))
    return sorted(int(name[1]) for name in names if name)


def complete(folder: Path) -> Iterator[Checkpoint]:
    """Complete checkpoints of ``folder``, the one saved last first."""
    numbered = [(_number(folder / f"iter_{n:07d}" / MANIFEST), n) for n in iterations(folder)]
    for _, iteration in sorted(numbered, reverse=True):
        checkpoint = inspect(folder, iteration)
        if checkpoint.state is State.COMPLETE:
            yield checkpoint


def newest_complete(folder: Path) -> Checkpoint | None:
    """The checkpoint that was saved last and to the end."""
    return next(complete(folder), None)


def choose(folder: Path | str, option: str = "--load", step: int | None = None) -> Choice:
    """Decides what a run starts from.

    Args:
        folder: of the checkpoints and their tracker file.
        option: the argument that named it, for error messages.
        step: ``--ckpt-step``, which always wins.

    Raises:
        UsageError: what the tracker or ``step`` name cannot be loaded, or somebody's mistake is more likely than a
            killed process. An older checkpoint is never taken in the place of a damaged one without being asked for.
    """
    folder = Path(folder)
    if step:
        return _asked_for(folder, option, step)
    latest = newest_complete(folder)
    tracker = folder / TRACKER
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if text == "release":
        return Choice(folder, 0, f"starting from the release checkpoint in {folder}")
    if not text:
        return _without_tracker(folder, option, latest, "is empty" if tracker.is_file() else "is missing")
    if not text.isdecimal():
        _refuse(folder, option, f"{TRACKER} should name an iteration but says {text[:40]!r}", latest)
    tracked = inspect(folder, int(text))
    if latest and latest.iteration == tracked.iteration:
        return _continuing(latest, "")
    name = tracked.folder.name
    # killed after the last file of a checkpoint, before the tracker
    if latest and latest.number > tracked.number and _written(latest.folder / MANIFEST) >= _written(tracker):
        return _continuing(latest, f"complete, though {TRACKER} still names {name}: the run was killed in between")
    if tracked.state in (State.MISSING, State.INCOMPLETE, State.DAMAGED):
        _refuse(folder, option, f"{TRACKER} names {name}, but {tracked.problem}", latest)
    if tracked.state is State.UNVERIFIED:
        return _continuing(tracked, f"{tracked.problem}, so damage to its files would go unnoticed")
    offer = f"add --ckpt-step {tracked.iteration} for the one, --ckpt-step {latest.iteration} for the other"
    raise UsageError(f"{option} {folder}: {TRACKER} names {name}, but {latest.folder.name} was saved later: {offer}")


def _asked_for(folder: Path, option: str, step: int) -> Choice:
    asked = inspect(folder, step)
    if asked.state is State.COMPLETE:
        return _continuing(asked, "as --ckpt-step asks")
    if asked.state is State.UNVERIFIED:
        return _continuing(asked, f"as --ckpt-step asks; {asked.problem}, so damage to its files would go unnoticed")
    others = ", ".join(str(checkpoint.iteration) for checkpoint in complete(folder)) or "none"
    raise UsageError(
        f"--ckpt-step {step}: {option} {folder} has no complete checkpoint of that iteration "
        f"({asked.folder.name}: {asked.problem}); complete ones: {others}"
    )


def _without_tracker(folder: Path, option: str, latest: Checkpoint | None, what: str) -> Choice:
    if latest:
        later = (inspect(folder, iteration) for iteration in iterations(folder) if iteration > latest.iteration)
        damaged = [checkpoint for checkpoint in later if checkpoint.state is State.DAMAGED]
        if damaged:
            _refuse(folder, option, f"{TRACKER} {what}, and in {damaged[-1].folder.name} {damaged[-1].problem}", latest)
        return _continuing(latest, f"the complete checkpoint that was saved last, though {TRACKER} {what}")
    left = [f"iter_{iteration:07d}" for iteration in iterations(folder)]
    if not left:
        return Choice(folder, None, None)
    note = f"starting from the beginning: {listed(left)} incomplete in {folder} ({TRACKER} {what})"
    return Choice(folder, None, note)


def _continuing(checkpoint: Checkpoint, reason: str) -> Choice:
    folder = checkpoint.folder.parent
    note = f"continuing from iteration {checkpoint.iteration} in {folder}" + (f" ({reason})" if reason else "")
    return Choice(folder, checkpoint.iteration, note)


def _refuse(folder: Path, option: str, problem: str, latest: Checkpoint | None) -> NoReturn:
    raise UsageError(f"{option} {folder}: {problem}; {instead(latest)}")


def instead(other: Checkpoint | None) -> str:
    """What to do where a checkpoint cannot be loaded, if ``other`` is the newest that can."""
    if other is None:
        return "there is no other complete checkpoint: start anew with another --save or --run-name"
    return f"add --ckpt-step {other.iteration} to continue from the newest complete one, {other.folder.name}"


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns
