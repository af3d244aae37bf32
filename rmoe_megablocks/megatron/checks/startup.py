"""The net under the start of a run: a refusal of Megatron's becomes one line, and its traceback is kept."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rmoe_megablocks.compat.megatron.errors import explain, is_refusal, lost_contact, out_of_memory
from rmoe_megablocks.errors import CommonError, UsageError


class in_one_line(contextlib.AbstractContextManager):
    """Around building and training a model: turns a refusal before the first iteration into UsageError.

    The whole traceback goes to standard output, which is Megatron's log. Any other error, and every error of a run
    that has begun, passes. A rank that only notices that another one is gone leaves the word to that one.

    Args:
        args: Megatron's, for the values of the options in question; a function where they are known later.
        has_begun: whether an iteration is done.
        log: file that standard output goes to, None for the terminal.
    """

    def __init__(self, args: Callable[[], argparse.Namespace | None], has_begun: Callable[[], bool], log: Path | None):
        self._args, self._has_begun, self._log = args, has_begun, log

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, UsageError) or self._has_begun():
            return
        if lost_contact(error):
            self._print_traceback(error)
            rank = os.environ.get("RANK", "0")
            print(f"rmoe: rank {rank} lost contact with another; its traceback is {self._place()}", file=sys.stderr)
            sys.exit(1)
        if out_of_memory(error):
            self._print_traceback(error)
            raise UsageError(
                f"out of memory before the first iteration ({' '.join(str(error).split())[:150]}): use more processes, "
                f"a smaller model or --micro-batch-size ('rmoe plan' counts); the traceback is {self._place()}"
            ) from error
        if is_refusal(error):
            self._print_traceback(error)
            raise UsageError(f"{explain(error, self._args())}; the traceback is {self._place()}") from error

    def _print_traceback(self, error: BaseException) -> None:
        if self._log is None and os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # as report_from_rank does: rank 0 mostly finds the same, and its exit ends this process
        traceback.print_exception(error, file=sys.stdout)
        sys.stdout.flush()

    def _place(self) -> str:
        return f"in {self._log}" if self._log else "above"


def ended_early(exit: SystemExit, log: Path) -> CommonError:
    """For Megatron's exit before there was a model: what it said last, which is in its log alone."""
    reason = exit.code if isinstance(exit.code, str) else f"exit code {exit.code or 0}"
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = f", which ends with: {lines[-1][:200]}" if lines else ""
    return CommonError(f"Megatron ended the run before its first iteration ({reason}); its log is {log}{said}")
