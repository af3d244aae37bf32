"""A disk that is full when a run writes to it: a small file system filled on purpose, or a planted error.

A real one takes ``mount -t tmpfs`` and so root; the errors that it cannot show (a quota, a broken disk, permissions as
root) and the files that are too small to be hit by chance are planted where they are opened for writing.
"""

import builtins
import errno
import functools
import io
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = 8 << 20
LEFT = 300_000  # less than a checkpoint of TINY, more than everything else


def mount(folder: Path) -> bool:
    """Puts a file system of SIZE bytes at ``folder``, if this process may."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(folder: Path, left: int) -> None:
    """Leaves ``left`` bytes of the file system of ``folder`` free."""
    with (folder / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - left)


class _Full:
    """A file that takes no byte."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._number = file, number

    def write(self, content: Any) -> int:
        raise OSError(self._number, os.strerror(self._number))

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def on_write(name: str, number: int, when_opened: bool = False, times: int = 1) -> Callable[[], None]:
    """Error ``number`` when a file whose name ends with ``name``, or a draft of it, is written, from ``times`` on."""
    seen = [0]

    def arm() -> None:
        original = builtins.open

        @functools.wraps(original)
        def failing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = "" if isinstance(file, int) else os.fsdecode(file)
            if mode[0] not in "wxa" or not path.removesuffix(".new").endswith(name):
                return original(file, mode, *args, **kwargs)
            seen[0] += 1
            if seen[0] < times:
                return original(file, mode, *args, **kwargs)
            if when_opened:
                raise OSError(number, os.strerror(number), path)
            return _Full(original(file, mode, *args, **kwargs), number)

        builtins.open = io.open = failing

    return arm


PLANTS: dict[str, Callable[[], None]] = {
    "full: data": on_write(".distcp", errno.ENOSPC),
    "full: index": on_write("/.metadata.tmp", errno.ENOSPC),
    "full: config": on_write("/metadata.json", errno.ENOSPC),
    "full: manifest": on_write("/integrity.json", errno.ENOSPC),
    "full: draft of the manifest": on_write("/integrity.json.draft", errno.ENOSPC),
    "full: tracker": on_write("latest_checkpointed_iteration.txt", errno.ENOSPC),
    "full: metrics": on_write("metrics.jsonl", errno.ENOSPC, times=2),
    "full: summary": on_write("summary.json", errno.ENOSPC),
    "full: log": on_write("rank0.log", errno.ENOSPC),
    "full: events": on_write(".tfevents", errno.ENOSPC),
    "quota: data": on_write(".distcp", errno.EDQUOT),
    "broken: data": on_write(".distcp", errno.EIO),
    "read-only: data": on_write(".distcp", errno.EROFS, when_opened=True),
    "denied: tracker": on_write("latest_checkpointed_iteration.txt", errno.EACCES, when_opened=True),
}


def _mounted_copy(folder: Path) -> None:
    if not mount(folder):
        raise OSError(f"cannot mount a file system at {folder}")
    shutil.copytree(folder.parent / "base", folder, dirs_exist_ok=True)
    fill(folder, LEFT)


#: what may be done to a run's folder before a step
BEFORE: dict[str, Callable[[Path], None]] = {
    "a copy of base on a disk that is almost full": _mounted_copy,
    "a new disk that is almost full": lambda folder: mount(folder) and fill(folder, LEFT),
    "room for the first figures": lambda folder: fill(folder, 30_000),
    "a disk that is full": lambda folder: fill(folder, 0),
    "make room": lambda folder: (folder / "filling").unlink(),
}
