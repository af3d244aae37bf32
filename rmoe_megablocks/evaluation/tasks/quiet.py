"""Settings of the process around an evaluation by the harness. To be entered before its libraries are imported."""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from rmoe_megablocks.process import quiet_logging

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
#: what the libraries have read of it at their import, if that was before
_CONSTANTS = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    "evaluate.config": ("HF_EVALUATE_OFFLINE",),
}


@contextlib.contextmanager
def settings(offline: bool) -> Iterator[None]:
    """One process, bars of 80 columns where there is no terminal to ask, no warnings; no network if ``offline``."""
    # without it the harness forks as many processes as there are cores to draw the bootstrap's samples
    chosen = {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not sys.stderr.isatty():
        chosen |= {"COLUMNS": "80", "LINES": "24"}  # where tqdm looks then
    if offline:
        chosen |= dict.fromkeys(_OFFLINE, "1")
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    constants = list(_constants()) if offline else []
    for module, name, _ in constants:
        setattr(module, name, True)
    try:
        with quiet_logging():
            yield
    finally:
        for module, name, value in constants:
            setattr(module, name, value)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _constants() -> Iterator[tuple[ModuleType, str, bool]]:
    for module, names in _CONSTANTS.items():
        if (found := sys.modules.get(module)) is not None:
            yield from ((found, name, getattr(found, name)) for name in names if hasattr(found, name))
