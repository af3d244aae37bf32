"""What launcher, torchrun's agent and workers share about processes."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import TextIO

from rmoe_megablocks.errors import CommonError, LoneError

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGTERM, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent dies, so that a killed run leaves nothing behind.

    ``parent`` is its process id where the caller knows it: should it be gone already, this process ends here.
    Linux only; elsewhere a killed launcher's processes have to be ended by hand.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os._exit(128 + number)


def serve_parent(parent: int) -> None:
    """For a helper process of a rank, of process id ``parent``: it lives exactly as long as the rank.

    torchrun sends SIGTERM to a rank's whole process group; the rank saves a checkpoint then and needs its helpers.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, parent)


def kill_helpers_at_exit() -> None:
    """For a rank: its helpers, which ignore SIGTERM, get SIGKILL when it ends, however it ends.

    multiprocessing would send them SIGTERM and wait for their end (multiprocessing/util.py, _exit_function).
    """
    multiprocessing.util.Finalize(None, _kill_helpers, exitpriority=100)


def _kill_helpers() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed loader's worker an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def quiet_warnings(speaks: bool) -> None:
    """Drop Megatron's warnings about optional packages, and all of them in a process that does not speak for the run.

    Every rank gives the same warnings; one of them, rank 0, is enough. ``python -W`` brings them all back.
    """
    if sys.warnoptions:
        return
    if not speaks:
        warnings.simplefilter("ignore")
    expected = r"Transformer Engine and Apex are not|Apex is not|Only transformer-engine|Could not determine rank"
    warnings.filterwarnings("ignore", message=expected)


@contextlib.contextmanager
def quiet_logging(level: int = logging.WARNING) -> Iterator[None]:
    """Drops what is logged up to ``level``; also a decorator. Megatron sends INFO and above to the terminal."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


class _Lines:
    """A stream for progress bars: each refresh is a line, where a terminal would write over the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes what ``text`` shows, as a line of its own; nothing for what only moves the cursor."""
        line = text.replace("\r", "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()


def progress_stream(stream: TextIO | None = None) -> TextIO | _Lines:
    """Where a progress bar goes: standard error, without carriage returns if that is a file and no terminal."""
    stream = stream or sys.stderr
    return stream if stream.isatty() else _Lines(stream)


def report(message: object) -> None:
    """One line of an error on standard error."""
    print(f"rmoe: error: {message}", file=sys.stderr, flush=True)


def report_from_rank(message: object) -> None:
    """One line of an error that every rank tends to find, from a process that torchrun started and that now ends."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or isinstance(message, LoneError):
        report(message)
        return
    # Rank 0's exit ends this process during the wait; a rank with an error of its own survives it and speaks.
    time.sleep(3)
    if not isinstance(message, CommonError):
        report(f"rank {rank}: {message}")
