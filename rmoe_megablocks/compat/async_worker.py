"""The process that writes a rank's asynchronous checkpoints (Megatron's persistent worker), made to end with its rank.

Megatron starts it from a fork server (initialize.py:74), so that it is neither the rank's child nor a copy of it: it
would wait for work for ever when the rank is killed, and know nothing of CPU mode. Nothing here imports torch or
Megatron before CPU mode is there.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from typing import Any


def serve(rank_pid: int, *args: Any) -> None:
    """What the process does: Megatron's own loop, with ``args``, for as long as the process ``rank_pid`` lives."""
    end_with(rank_pid)
    sys.unraisablehook = _unless_of_a_file
    from rmoe_megablocks.compat import megatron_cpu

    megatron_cpu.install(announce=False)
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    from rmoe_megablocks.compat.megatron import checkpoints

    checkpoints.keep_errors_of_writers()
    PersistentAsyncCaller.async_loop(*args)


def _unless_of_a_file(unraisable: sys.UnraisableHookArgs) -> None:
    """Says nothing of a file that could not be closed when it was given up: what failed before has been reported.

    Python 3.13 writes a traceback for each; on a full disk they would stand before the line that says so.
    """
    if not (isinstance(unraisable.object, io.IOBase) and isinstance(unraisable.exc_value, (OSError, ValueError))):
        sys.__unraisablehook__(unraisable)


def end_with(pid: int) -> None:
    """Ends this process when the process ``pid`` ends, and not by the SIGTERM with which torchrun asks both to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        alive = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):  # an old kernel, or another system
        return

    def watch() -> None:
        select.select([alive], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="end with the rank", daemon=True).start()
