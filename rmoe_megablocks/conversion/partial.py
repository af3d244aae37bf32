"""The folder that something is written in until it is whole: beside its place, by one process at a time."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rmoe_megablocks import run_lock
from rmoe_megablocks.errors import UsageError

_SUFFIX = ".partial"
_MARK = "conversion.unfinished"


def check_new(target: Path) -> None:
    """Raises UsageError where ``target`` exists, and where what would be written in belongs to somebody."""
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists: name a new folder, or remove it")
    partial = _beside(target)
    if partial.is_symlink() or (partial.exists() and not (partial / _MARK).is_file()):
        raise UsageError(
            f"{partial} exists and is not what a killed conversion left: remove it, or name another folder"
        )


@contextlib.contextmanager
def writing(target: Path, option: str) -> Iterator[Path]:
    """The folder to write in; it takes the place of ``target`` in one step where nothing was raised.

    What an earlier conversion left in it is still there.

    Raises:
        UsageError: another process writes there; ``target`` has appeared meanwhile.
    """
    partial = _beside(target)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _MARK).touch()
    lock = run_lock.acquire(partial, option, say)
    try:
        yield partial
        if target.exists():
            raise UsageError(f"{target} has appeared meanwhile: what was written is in {partial}")
    finally:
        lock.release()
    (partial / _MARK).unlink()
    partial.rename(target)


def is_ours(name: str) -> bool:
    """Whether a name in the folder belongs to what keeps it, not to what is written."""
    return name in (_MARK, run_lock.NAME)


def say(line: str) -> None:
    """Tells what takes a while, on standard error."""
    print(f"rmoe: {line}", file=sys.stderr, flush=True)


def _beside(target: Path) -> Path:
    return target.with_name(target.name + _SUFFIX)
