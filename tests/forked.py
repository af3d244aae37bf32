"""Processes that have Megatron imported already, forked from a server that has no threads: not seconds each, but none.

For tests of what a process does. How one is started is for tests/test_end_to_end.py and tests/launch.
"""

import contextlib
import multiprocessing
import os
import pkgutil
import signal
import time
from collections.abc import Iterator, Mapping
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from rmoe_megablocks.compat import megatron_cpu

REPOSITORY = Path(__file__).parents[1]
# One list, since one server serves all tests of a process
_PRELOADED = ["tests.preloaded", "tests.distributed.worker"]


def context() -> BaseContext:
    """The server's; with a GPU, which a fork of a process that has looked for one cannot use, new interpreters."""
    if not megatron_cpu.needed():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(_PRELOADED)
    return forking


@contextlib.contextmanager
def started(
    function: str, arguments: tuple, log: Path, environments: list[Mapping[str, str]]
) -> Iterator[list[BaseProcess]]:
    """``function`` ("module:name") in a process for each of ``environments``, which are added to this one's.

    All that they print goes to ``log``. Whatever they have started ends with the context.
    """
    log.write_text("")
    processes = []
    try:
        for environment in environments:
            complete = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            process = context().Process(target=_run, args=(function, arguments, complete, str(log)))
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not have had the time for a group of its own
            process.join()


@contextlib.contextmanager
def ranks(function: str, arguments: tuple, processes: int, log: Path) -> Iterator[list[BaseProcess]]:
    """:func:`started` as the ranks of one process group, with the environment that torchrun gives."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes)}
    group |= {"LOCAL_WORLD_SIZE": str(processes)}
    group |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is here
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with started(function, arguments, log, [group | number for number in numbers]) as running:
        yield running


def end(processes: list[BaseProcess], seconds: float, grace: float = 0) -> list[int | None]:
    """Waits for all; once one has failed, only for ``grace`` seconds. Exit codes, None of who has not ended."""
    deadline, failed = time.monotonic() + seconds, False
    while running := [process for process in processes if process.exitcode is None]:
        if not failed and any(process.exitcode for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + grace)
        if not connection.wait([process.sentinel for process in running], max(0, deadline - time.monotonic())):
            break
    return [process.exitcode for process in processes]


def _run(function: str, arguments: tuple, environment: dict[str, str], log: str) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in an interpreter of its own
    pkgutil.resolve_name(function)(*arguments)
