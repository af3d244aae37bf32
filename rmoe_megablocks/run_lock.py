"""One run a folder: a lock that holds over processes, nodes and shared file systems, and that no kill leaves stale.

The lock is a file, ``run.lock``, that says who made it. It is made in one step (a link to a finished file: atomic over
NFS as well) and its modification time is the holder's sign of life. Somebody else's lock is stale if

* it was made on this machine (same boot, same process namespace) by a process that is gone, told by its id and its
  start time, for ids are used again;
* it was made by an earlier start of the SLURM job that this process belongs to: SLURM runs a job once at a time;
* its holder, on another machine or before this one was booted, gives no sign of life for ``DEAD_AFTER`` seconds. That
  is watched rather than computed, because clocks of machines differ.

filelock, which torch brings along, keeps neither the holder's name nor a sign of life: its locks of the kind that works
over NFS survive a kill -9 on another node for good. The kernel's locks (flock, lockf) are silently local on many shared
file systems.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import report

NAME = "run.lock"
BEAT_SECONDS = 15.0
DEAD_AFTER = 120.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: name of the machine.
        machine: what tells one boot of one machine, and one process namespace in it, from all others.
        pid, started: the process, and when it was started (seconds since the epoch, by that machine's clock).
        job: SLURM's job id and how often it was started before, both None outside SLURM.
        since: when the lock was made, as text.
    """

    host: str
    machine: str
    pid: int
    started: float
    job: str | None
    restart: int | None
    since: str

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class Held(UsageError):
    """Somebody else runs there."""


def check(folder: Path, option: str, say: Say = print) -> None:
    """Raises Held if a run that is alive holds ``folder``; a stale lock goes. Waits as :func:`acquire` does."""
    path = folder / NAME
    holder = _read(path)
    if holder is not None and not (_is_stale(path, holder, say) and _clear(path, holder)):
        raise _held(folder, option, holder)


def acquire(folder: Path, option: str, say: Say = print) -> Lock:
    """Locks ``folder`` for this process, until it ends or releases the lock.

    Args:
        folder: exists.
        option: the argument to change for another folder.
        say: told before waiting for another machine's sign of life, for ``DEAD_AFTER`` seconds at most.

    Raises:
        Held: names the holder.
    """
    path, mine = folder / NAME, _myself()
    while not _make(path, mine):
        holder = _read(path)
        if holder is None:
            continue  # gone in between
        if not _is_stale(path, holder, say) or not _clear(path, holder):
            raise _held(folder, option, holder)
    return Lock(path, mine)


class Lock:
    """A lock that this process holds: gives its signs of life, and goes with the process."""

    def __init__(self, path: Path, mine: Holder) -> None:
        self._path, self._mine = path, mine
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def release(self) -> None:
        """Gives the folder free. Nothing in a forked copy of the process, or when called again."""
        if self._done.is_set() or os.getpid() != self._mine.pid:
            return
        self._done.set()
        with contextlib.suppress(OSError):  # the next run finds it stale: its process is gone by then
            if _read(self._path) == self._mine:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            try:
                holder = _read(self._path)
                if holder == self._mine:
                    os.utime(self._path)
                    continue
            except OSError:
                continue  # the file system is away for a while
            if self._done.is_set():
                return
            # suspended for so long that somebody took this run for dead: two must not write
            report(f"the lock of {self._path.parent} was taken by {holder or 'somebody'}: this run ends without saving")
            os._exit(1)


def _held(folder: Path, option: str, holder: Holder) -> Held:
    return Held(
        f"{folder} is in use by another run ({holder}): wait for it or stop it, or choose another {option}; if it is "
        f"certain that it is gone, remove {folder / NAME}"
    )


def _myself() -> Holder:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    job = os.environ.get("SLURM_JOB_ID")
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        job=job,
        restart=(int(restart) if restart.isdigit() else 0) if job else None,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _make(path: Path, mine: Holder) -> bool:
    """Makes the lock, if there is none."""
    finished = path.with_name(f"{NAME}.{mine.pid}.{socket.gethostname()}")
    finished.write_text(json.dumps(asdict(mine)))
    try:
        os.link(finished, path)
    except FileExistsError:
        return False
    finally:
        finished.unlink()
    return True


def _read(path: Path) -> Holder | None:
    """The holder of a lock, None where there is no lock."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise Held(f"{path} is not a lock of ours: remove it if no run uses {path.parent}") from None


def _is_stale(path: Path, holder: Holder, say: Say) -> bool:
    me = _myself()
    if holder.machine == me.machine:
        return not _alive(holder)
    if holder.job is not None and holder.job == me.job and holder.restart < me.restart:
        return True
    return not _gives_sign(path, holder, say)


def _alive(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        return abs(process.create_time() - holder.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gives_sign(path: Path, holder: Holder, say: Say) -> bool:
    """Watches another machine's lock until it is touched, or long enough."""
    try:
        first = path.stat().st_mtime_ns
        say(f"{path.parent} was in use by {holder}: waiting {DEAD_AFTER:.0f} s at most for a sign of life")
        deadline = time.monotonic() + DEAD_AFTER
        while time.monotonic() < deadline:
            time.sleep(min(1.0, DEAD_AFTER / 10))
            if path.stat().st_mtime_ns != first:
                return True
    except FileNotFoundError:
        pass  # released
    return False


def _clear(path: Path, holder: Holder) -> bool:
    """Removes the stale lock of ``holder``; False where somebody else has replaced it in the meantime."""
    aside = path.with_name(f"{NAME}.stale.{os.getpid()}.{socket.gethostname()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    try:
        if _read(aside) == holder:
            return True
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # back to whom it belongs
        return False
    finally:
        aside.unlink()
