"""Starts the runs of a study that are not there yet, and says how far they are."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.sweep.study import Planned

RECORD = "sweep.json"  # in a run's folder once it is done: the words it was started with
_REPORT_EVERY = 30.0  # seconds
_TAIL = 4096  # bytes of a log in which the last line is looked for


@dataclass
class Job:
    """A run under way."""

    run: Planned
    process: subprocess.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)

    def last_line(self) -> str:
        """The newest of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL))
            lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "starting")


def is_done(run: Planned, runs_dir: Path, words: Sequence[str]) -> bool:
    """Whether the run was finished with the same words. Raises UsageError if with other ones: pairs would not match."""
    record = runs_dir / run.name / RECORD
    if not record.is_file():
        return False
    try:
        earlier = json.loads(record.read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{record}: cannot be read; remove the run's folder to do it again") from None
    if earlier != list(words):
        raise UsageError(
            f"{record.parent}: was made with other arguments ({shlex.join(earlier)}); give another --runs-dir, or "
            "remove the folder"
        )
    return True


def check(run: Planned, words: Sequence[str], runs_dir: Path) -> None:
    """The launcher's own check, which starts nothing. Raises UsageError with its line."""
    done = subprocess.run(_command(run, words, runs_dir, "--dry-run"), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UsageError(f"{run.name}: {lines[-1].removeprefix('rmoe: error: ')}")


def _command(run: Planned, words: Sequence[str], runs_dir: Path, *more: str) -> list[str]:
    place = ["--runs-dir", str(runs_dir), "--run-name", run.name]
    return [sys.executable, "-m", "rmoe_megablocks.launcher", *words, *place, *more]


def run_all(todo: Sequence[tuple[Planned, Sequence[str]]], runs_dir: Path, jobs: int, done: int) -> list[str]:
    """Runs ``todo``, ``jobs`` side by side; the names of those that failed. ``done`` are there already.

    A signal is passed on: the runs save a checkpoint and end; the same command continues them.

    Raises:
        KeyboardInterrupt: once they have ended.
    """
    waiting, active, failed, total = list(todo), [], [], done + len(todo)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    told = time.monotonic()
    with _passing_on(active):
        while waiting or active:
            while waiting and len(active) < jobs:
                run, words = waiting.pop(0)
                log = runs_dir / f"{run.name}.log"
                with log.open("w") as output:
                    command = _command(run, words, runs_dir)
                    process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
                active.append(Job(run, process, log))
                _say(f"[{total - len(waiting)}/{total}] {run.name}: started, log {log}")
            time.sleep(0.2)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                minutes, seconds = divmod(int(time.monotonic() - job.started), 60)
                if job.process.returncode == 0:
                    _finish(job.run, dict(todo)[job.run], runs_dir)
                    _say(f"{job.run.name}: done in {minutes}:{seconds:02d}; {job.last_line()}")
                else:
                    failed.append(job.run.name)
                    _say(f"{job.run.name}: exit code {job.process.returncode}; {job.last_line()}; see {job.log}")
            if time.monotonic() - told > _REPORT_EVERY:
                told = time.monotonic()
                for job in active:
                    _say(f"{job.run.name}: {job.last_line()}")
    return failed


def _finish(run: Planned, words: Sequence[str], runs_dir: Path) -> None:
    record = runs_dir / run.name / RECORD
    written = record.with_suffix(".new")
    written.write_text(json.dumps({"arguments": list(words)}, indent=2) + "\n")
    written.replace(record)


@contextlib.contextmanager
def _passing_on(active: list[Job]):
    """Ctrl-C reaches the runs by itself, as it goes to all of the terminal's processes; SIGTERM has to be sent."""

    def terminated(number: int, frame: object) -> None:
        for job in active:
            job.process.send_signal(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _say("interrupted: waiting for the runs to save a checkpoint and end; the same command goes on")
        for job in active:
            job.process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(f"rmoe: {text}", file=sys.stderr, flush=True)
