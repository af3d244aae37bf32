"""What a table must say of where it was measured, and on what it measures."""

import os
import platform
from pathlib import Path


def device():
    """The GPU if there is one, else the CPU. CPU mode's torch.cuda would pass for a GPU."""
    import torch

    from rmoe_megablocks.compat import megatron_cpu

    return torch.device("cpu") if megatron_cpu.needed() else torch.device("cuda", torch.cuda.current_device())


def name() -> str:
    """Of the GPU, or of the processor."""
    import torch

    return _processor() if device().type == "cpu" else torch.cuda.get_device_name(0)


def describe() -> str:
    """Processor or GPU, cores and versions, in one line."""
    import torch

    if device().type == "cuda":
        hardware = f"{name()}, CUDA {torch.version.cuda}"
    else:
        threads = torch.get_num_threads()
        hardware = f"{name()}, {threads} thread{'s' * (threads != 1)} on {len(os.sched_getaffinity(0))} cores"
    return f"{hardware}; {versions()}"


def versions() -> str:
    """Of torch and Python."""
    import torch

    return f"torch {torch.__version__}, Python {platform.python_version()}"


def load() -> str:
    """How busy a machine is that others may use: the mean number of running processes of the last minute."""
    return f"load {os.getloadavg()[0]:.1f} at the start"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
