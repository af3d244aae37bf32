"""A run's name, made so that the same command finds its own run again and another one does not."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 100


def run_name(config: Path, overrides: Sequence[str]) -> str:
    """The configuration's name and what the command line changes: ``tiny``, ``tiny-bf16``, ``tiny-train-iters-20``.

    A name that cannot say everything, because it would be too long or has characters that a folder's name should not
    have, ends in a digest of the whole. It is cut at a word.

    Args:
        config: the configuration file.
        overrides: arguments of the command line, without the launcher's own.
    """
    words = [config.stem, *(word.removeprefix("--") for word in overrides)]
    plain = [re.sub(r"[^\w.,+-]+", "_", word.replace("/", "+")) for word in words]
    name = "-".join(plain)
    if len(name) <= _LONGEST and all(_says_all(word, spelled) for word, spelled in zip(words, plain, strict=True)):
        return name
    while len(name) > _LONGEST and len(plain) > 1:
        name = "-".join(plain := plain[:-1])
    digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:12]
    return f"{name[:_LONGEST]}-{digest}"


def _says_all(word: str, spelled: str) -> bool:
    """Whether the word can be told from its spelling: a path's slashes are spelled +."""
    return "+" not in word and word.replace("/", "+") == spelled
