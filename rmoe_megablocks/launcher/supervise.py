"""Running torchrun's agent so that a signal ends the training with a checkpoint.

torchrun answers a signal by ending its workers within 30 seconds, which is too short for a checkpoint, and a
terminal's Ctrl-C reaches every process at once. So the agent gets a session of its own, and the launcher alone
decides what a signal means: the first one asks the workers, and only them, to save and exit; then the agent sees
workers that have finished, not a stopped run.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import psutil

#: SIGUSR1 is what SLURM's --signal sends before the time limit; SIGHUP is a closed terminal
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
KILL_AFTER_SECONDS = 3.0
_POLL_SECONDS = 0.2


class _Stop:
    """The signals received so far; the handler only records, the loop acts."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self, number: int, _frame: object) -> None:
        self.received.append(number)


@contextlib.contextmanager
def _handled(stop: _Stop) -> Iterator[None]:
    previous = {}
    for number in STOP_SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_agent(command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run ``command``, a torchrun agent whose children are the workers, to its end; the exit code of the run.

    The first signal asks the workers to save and exit, the second kills everything. The exit code is the agent's;
    for a run that a signal ended without its workers finishing it is 128 + the signal's number.
    """
    stop = _Stop()
    with _handled(stop):
        agent = subprocess.Popen(command, env=env, start_new_session=True)
        asked = False
        while True:
            try:
                code = agent.wait(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                pass
            if len(stop.received) > 1:
                _say("stopping at once")
                _kill(agent.pid)
                agent.wait()
                return 128 + stop.received[-1]
            if stop.received and not asked:
                asked = True
                _ask_to_stop(agent.pid)
    if code < 0:
        code = 128 - code
    if stop.received and code == 128 + signal.SIGTERM:
        # the workers were still starting (or Megatron's handler is switched off): the signal itself ended them
        _say("stopped without a checkpoint")
        return 128 + stop.received[0]
    return code


def _ask_to_stop(agent_pid: int) -> None:
    try:
        workers = psutil.Process(agent_pid).children()
    except psutil.NoSuchProcess:
        return
    if workers:
        _say("stopping, in training with a checkpoint (press again to stop at once)")
    else:
        workers = [psutil.Process(agent_pid)]  # no worker yet: nothing to save
    _signal(workers, signal.SIGTERM)


def _kill(agent_pid: int) -> None:
    """End the agent and everything below it; each worker is a session of its own, so a process group is not enough."""
    try:
        agent = psutil.Process(agent_pid)
        processes = [*agent.children(recursive=True), agent]
    except psutil.NoSuchProcess:
        return
    _signal(processes, signal.SIGTERM)
    deadline = time.monotonic() + KILL_AFTER_SECONDS
    while time.monotonic() < deadline and any(_alive(process) for process in processes):
        time.sleep(0.05)
    _signal([process for process in processes if _alive(process)], signal.SIGKILL)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _say(line: str) -> None:
    print(f"rmoe: {line}", file=sys.stderr, flush=True)
