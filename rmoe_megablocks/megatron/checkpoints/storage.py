"""A run whose storage takes no more ends in one line: where, why, how much is free and where a restart goes on.

The rank that writes notices, and every rank writes something; several may notice at once, and the others lose contact
with it. So the ranks settle over torchrun's own store, which outlives each of them, which one speaks.
"""

import argparse
import contextlib
import datetime
import errno
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from rmoe_megablocks.compat.megatron.errors import lost_contact
from rmoe_megablocks.errors import LoneError, UsageError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
BROKEN = {
    errno.EIO: "the storage has failed (input/output error)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ESTALE: "the file system has gone (stale file handle)",
}
_WAIT = 10.0  # for the rank that knows more
_TOLD = re.compile(r"\[Errno (\d+)\] [^:'\"]*(?:: ['\"]([^'\"]+))?")

_OF_NUMPY = re.compile(r"\d+ requested and \d+ written|Not enough free space to write")  # they have no number


class in_one_line(contextlib.AbstractContextManager):
    """Turns an error of the storage, wherever it was noticed, into LoneError on one rank and exit code 2 on the others.

    Args:
        args: the run's; ``save`` is named where an error of a checkpoint does not say which file it is about.
        folder: of the run, named for any other error that does not say it.
        restart: says from where the same command goes on.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, restart: Callable[[], str]) -> None:
        self._args, self._folder, self._restart = args, folder, restart

    def __enter__(self) -> None:
        self._hook, threading.excepthook = threading.excepthook, self._in_a_thread

    def _in_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread would print a traceback; it raises the same in the rank at the next figure."""
        if failed.exc_value is None or find(failed.exc_value) is None:
            self._hook(failed)

    def __exit__(self, kind, error, trace) -> None:
        threading.excepthook = self._hook
        if error is None or isinstance(error, UsageError | SystemExit | KeyboardInterrupt):
            return
        found = find(error)
        if found is None:
            if _only_heard_of_it(error) and _was_said(error):
                raise SystemExit(2) from error
            return
        if not _may_speak():
            raise SystemExit(2) from error
        raise LoneError(f"{describe(found, self._place(error))}; {self._restart()}") from error

    def _place(self, error: BaseException) -> Path:
        frames = [frame for one in chain(error) for frame in traceback.extract_tb(one.__traceback__)]
        of_checkpoints = any(
            re.search(r"/(dist_checkpointing|checkpointing\.py|checkpoint/)", f.filename) for f in frames
        )
        events = getattr(self._args, "tensorboard_dir", None)
        if events and any("/tensorboard/" in frame.filename for frame in frames):
            return Path(events)
        return Path(self._args.save) if of_checkpoints and self._args.save else self._folder


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Gives an OSError the name of its file, which only opening one does, not writing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def find(error: BaseException) -> OSError | None:
    """The error of the storage that ``error`` is, was raised for, or reports from other ranks' processes; else None."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in _FULL | BROKEN:
            return one
        if isinstance(one, OSError) and _OF_NUMPY.search(" ".join(map(str, one.args))):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), one.filename)
        for said in map(str, getattr(one, "failures", {}).values()):  # what other ranks have sent is text
            for number, path in _TOLD.findall(said):
                if int(number) in _FULL | BROKEN:
                    return OSError(int(number), os.strerror(int(number)), path or None)
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised for, or in the handling of."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def describe(error: OSError, place: Path) -> str:
    """``PATH: the disk is full (0 of 3,145,728 bytes free)``."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place
    if error.errno not in _FULL:
        return f"{path}: {BROKEN[error.errno]}"
    standing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    usage = shutil.disk_usage(standing)
    return f"{path}: {_FULL[error.errno]} ({usage.free:,} of {usage.total:,} bytes free)"


def _only_heard_of_it(error: BaseException) -> bool:
    """Whether the error says no more than that another rank failed."""
    nothing_but_that = any(isinstance(one, CheckpointException) and not one.failures for one in chain(error))
    return nothing_but_that or lost_contact(error)


def _store() -> torch.distributed.Store | None:
    """The store that the ranks met at, as another client of it: their own connection may be busy; None for one rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = torch.distributed.TCPStore(address, port, None, False, datetime.timedelta(seconds=5))
    return torch.distributed.PrefixStore("rmoe storage", client)


def _may_speak() -> bool:
    try:
        store = _store()
        return store is None or store.add("said", 1) == 1
    except RuntimeError:  # what torch's stores raise: the process that kept it is gone, and its rank has spoken
        return os.environ.get("RANK", "0") == "0"


def _was_said(error: BaseException) -> bool:
    """Whether another rank has said why. One that lost contact knows at once: that rank spoke before it ended."""
    deadline = time.monotonic() + (0 if lost_contact(error) else _WAIT)
    try:
        store = _store()
        while store is not None:
            if store.add("said", 0) > 0:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
    except RuntimeError:  # as in _may_speak
        return False
    return False
