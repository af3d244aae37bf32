"""The error that users see as one line, and what helps to word it."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: its text is one clear line that names the argument or file and what to do instead."""


class CommonError(UsageError):
    """Bad input that every rank of a run finds at the same place: rank 0 speaks for all."""


class LoneError(UsageError):
    """What one rank alone has found, or was chosen to tell: it speaks without waiting for rank 0."""


class UnknownArgument(UsageError):
    """An argument that nobody has: ``words`` as typed, its ``name``, and the ``known`` names to suggest one of."""

    def __init__(self, words: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unrecognized arguments: {words}{nearest(name, known)}")
        self.words, self.name, self.known = words, name, tuple(known)


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the known word that ``word`` most likely stands for, empty if none is near."""
    by_plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(word), by_plain, n=1, cutoff=0.65)
    return f" (did you mean {by_plain[found[0]]}?)" if found else ""


def _plain(word: str) -> str:
    return word.lower().replace("_", "-")
