"""Command lines as lists of words: what launcher, planning and hosts do with them before anybody parses them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def groups_of(argv: Sequence[str]) -> list[list[str]]:
    """``argv`` cut before every option: an option with the values that follow it."""
    groups: list[list[str]] = []
    for token in argv:
        if (token.startswith("--") and len(token) > 2) or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    return groups


@contextmanager
def program_arguments(argv: Sequence[str]) -> Iterator[None]:
    """``argv`` as the program's own arguments: some of Megatron's modules parse ``sys.argv`` again while it runs."""
    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        yield
    finally:
        sys.argv = saved
