"""A run's name, made so that the same command finds its own run again and another one does not."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 100


def run_name(config: Path, overrides: Sequence[str]) -> str:
    """The configuration's name and what the command line changes: ``tiny``, ``tiny-bf16``, ``tiny-train-iters-20``.

    Args:
        config: the configuration file.
        overrides: arguments of the command line, without the launcher's own.
    """
    name = re.sub(r"[^\w.,+-]+", "_", "-".join([config.stem, *(word.lstrip("-") for word in overrides)]))
    if len(name) > _LONGEST:
        digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:12]
        name = f"{name[:_LONGEST]}-{digest}"
    return name
