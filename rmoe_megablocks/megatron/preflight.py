"""Everything that can be refused is refused here, in one process, before torchrun starts the others."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.resolve import Run, resolve


@dataclass(frozen=True)
class Plan:
    """How to start a run: processes on this machine, and the run as one of them will see it.

    A process makes the embedded dataset where the run's folders are; ``run`` may name one that is gone.
    """

    nproc_per_node: int
    run: Run


def check(argv: Sequence[str], nproc_per_node: int | None = None, nnodes: int = 1) -> Plan:
    """Checks a run and leaves no file behind. Raises UsageError with one clear line for whatever would stop it.

    Args:
        argv: Megatron's arguments and ours, the configuration file's included.
        nproc_per_node: processes a machine; by default all GPUs, or without GPUs as many as one replica takes.
        nnodes: machines.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the workers will say it again
        if nproc_per_node is None:
            nproc_per_node = _processes(arguments.layout_size(arguments.parse(argv)), nnodes)
        with tempfile.TemporaryDirectory(prefix="rmoe-") as scratch:
            run = resolve(argv, nproc_per_node * nnodes, Path(scratch))
        check_devices(nproc_per_node, "--nproc-per-node")
        return Plan(nproc_per_node, run)


def check_devices(processes: int, option: str) -> None:
    """Refuses more ``processes`` on this machine than it has GPUs. Raises UsageError."""
    if not megatron_cpu.active() and processes > torch.cuda.device_count():
        raise UsageError(
            f"{option} {processes}: this machine has {torch.cuda.device_count()} GPUs, one for each process"
        )


def _processes(layout_size: int, nnodes: int) -> int:
    if not megatron_cpu.active():
        return torch.cuda.device_count()
    return -(-layout_size // nnodes)
