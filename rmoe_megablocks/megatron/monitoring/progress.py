"""Signs of life of work that is counted in tokens."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class TokenProgress:
    """A bar with the time that is left on a terminal, elsewhere a line now and then.

    Args:
        what: is done, as "evaluating test".
        tokens: in all.
        say: prints a line; None for a process that keeps silent.
    """

    def __init__(self, what: str, tokens: int, say: Callable[[str], None] | None) -> None:
        self._what, self._tokens, self._say = what, tokens, say
        self._done = 0
        self._started = self._last_line = time.perf_counter()
        self._bar = tqdm(
            total=tokens,
            desc=what,
            unit=" tokens",
            unit_scale=True,
            file=sys.__stderr__,
            disable=say is None or not sys.__stderr__.isatty(),
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> "TokenProgress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def update(self, tokens: int) -> None:
        """So many more are done."""
        self._done += tokens
        self._bar.update(tokens)
        now = time.perf_counter()
        if self._say is None or not self._bar.disable or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (now - self._started) / self._done * (self._tokens - self._done)
        share = f"{self._done:,} of {self._tokens:,} tokens ({self._done / self._tokens:.0%})"
        self._say(f"{self._what} | {share} | left {tqdm.format_interval(left)}")
