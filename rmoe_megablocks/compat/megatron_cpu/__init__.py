"""CPU mode: run Megatron's unmodified training stack without a GPU, over gloo.

Megatron-Core assumes CUDA in many small places (memory statistics, streams, type names, seeds), although nothing in
its parser, checkpointing, data sets, optimizers and pipeline schedules needs a GPU. This package stands in for those
places, so that a laptop or a CI machine can run the real thing, parallel layouts included.

Use it as the first thing a program does::

    from rmoe_megablocks.compat import megatron_cpu

    megatron_cpu.install()  # before the first "import megatron"; does nothing where there is a GPU

and give Megatron the arguments in ``ARGUMENTS`` (:func:`supply` adds them to a command line). CPU mode is for
developing and testing: numbers are those of the CPU kernels, memory statistics are the resident set of the process,
CUDA graphs, Transformer Engine and fp8 do not exist.

The touches, by module:

- ``device``: what ``torch.cuda`` answers, and devices named cuda that mean the CPU.
- ``arguments``: what CPU mode needs among Megatron's arguments.
- ``random``: the CPU generator in the place of the CUDA one.
- ``distributed``: gloo in the place of NCCL.
- ``megatron_patches``: the few places of Megatron itself.
- ``context_parallel``: attention over a sequence that is split over ranks.
- ``dataset_helper``: the datasets' compiled helper, for a checkout without one.
- ``fused_adam``: an optimizer with the interface of Apex's FusedAdam.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys

import torch

from rmoe_megablocks.compat.megatron_cpu.arguments import ARGUMENTS, supply

__all__ = ["ARGUMENTS", "active", "install", "needed", "supply"]

_active = False
_MARK = "RMOE_CPU_MODE_ANNOUNCED"


@functools.cache
def needed() -> bool:
    """Tell whether torch sees no GPU. The answer is kept: afterwards CPU mode makes torch claim that it sees one."""
    return not torch.cuda.is_available()


def active() -> bool:
    """Tell whether CPU mode is installed in this process."""
    return _active


def install(announce: bool = True) -> bool:
    """Install CPU mode where it is needed, and tell whether it is installed; ``announce`` says it in one line.

    It has to come before the first import of Megatron, which looks at torch while it is imported. Calling it again
    changes nothing.
    """
    global _active
    if _active:
        return True
    if not needed():
        return False
    if any(name == "megatron" or name.startswith("megatron.") for name in sys.modules):
        raise RuntimeError(
            "Megatron was imported before CPU mode was installed: call rmoe_megablocks.compat.megatron_cpu.install() "
            "before the first import of megatron"
        )
    from rmoe_megablocks.compat.megatron_cpu import device, distributed, random

    device.install()
    random.install()
    distributed.install()
    # Imports Megatron, so it comes when torch is ready for it.
    from rmoe_megablocks.compat.megatron_cpu import megatron_patches

    megatron_patches.install()
    _active = True
    if announce:
        _announce()
    return True


def _announce() -> None:
    """One line for a whole run: the launcher's workers and the checkpoint writer's processes inherit the mark."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None and _MARK not in os.environ:
        os.environ[_MARK] = "1"
        print(
            "CPU mode: no GPU found, Megatron runs on CPU over gloo (rmoe_megablocks.compat.megatron_cpu)", flush=True
        )
