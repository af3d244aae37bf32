"""What a run will take, computed from its arguments alone: parameters, FLOPs, memory, traffic (``rmoe plan``).

The command line is read by Megatron's own parser, so that nothing unknown to it is passed over; a recurrent router is
counted on its modules. Everything else is arithmetic on :class:`.settings.Settings`; the tests hold it against models
that Megatron builds.
"""

import importlib

_HOMES = {"Plan": "plan", "make_plan": "plan", "Settings": "settings", "read_settings": "settings"}

__all__ = list(_HOMES)


def __getattr__(name: str):
    """Late: they import torch, and the rmoe command, doctor included, has to start without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
