"""What a table must say of where it was measured."""

import os
import platform
from pathlib import Path


def describe() -> str:
    """Processor or GPU, cores and versions, in one line."""
    import torch

    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        device = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
