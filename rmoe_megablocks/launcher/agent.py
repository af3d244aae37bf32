"""torchrun with a short report.

``python -m rmoe_megablocks.launcher.agent ARGUMENTS`` is ``torchrun ARGUMENTS``, except that

* a failed worker is reported in one line under its own error, not in torchrun's page of text, and its exit code is
  passed on (torchrun's is always 1), so that 2 still says "mend the arguments";
* the agent, and with it the workers, end when the launcher is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from rmoe_megablocks.process import end_with_parent, report


def main(argv: list[str]) -> int:
    """Run torchrun in this process and return the exit code of the run."""
    # SLURM sends it to every process of a job step, but what it means is for the launcher to decide, see supervise.
    # Ignoring is inherited: by the workers, and by the helper processes that they need for saving.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()
    # the machine that hosts torchrun's store may be the first to finish: the others answer with a C++ stack trace
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    import torch  # noqa: F401  reads it

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the workers
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # torchrun's own variable: whoever sets it wants to see its messages
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError as error:
        return _failed(error.failures)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _failed(failures: Mapping[int, Any]) -> int:
    """Report the first failure in one line; the exit code of the run."""
    codes = {failure.exitcode for failure in failures.values()}
    if 2 in codes:
        return 2  # the worker has printed its one line
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        report(f"rank {rank} failed with exit code {first.exitcode}; its own message is above")
        return first.exitcode or 1
    number = -first.exitcode
    if number != signal.SIGTERM:  # SIGTERM is how a run is stopped: nothing to explain
        hint = " (out of memory is the usual cause)" if number == signal.SIGKILL else ""
        report(f"rank {rank} was ended by {signal.Signals(number).name}{hint}")
    return 128 + number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
