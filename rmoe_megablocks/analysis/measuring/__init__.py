"""Every measure of a recording, streamed in two passes with bounded memory; measures of several side by side.

``measure(recording)``, ``write(measured, folder)``, ``read(folder)``, ``compare([measured, ...])`` and
``over_training(recordings)``, which bring numpy and, for ``compare``, pandas when they are first asked for: a command
that only parses its arguments need not wait for them.
"""

from __future__ import annotations

import importlib
from typing import Any

_HERE = {
    "Options": "options",
    "compare": "comparing.table",
    "measure": "all_measures",
    "over_training": "training",
    "read": "files",
    "write": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HERE[name]}"), name)
