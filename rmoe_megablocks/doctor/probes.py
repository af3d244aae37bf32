"""Questions to this Python and this machine, each asked where a broken answer breaks nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from rmoe_megablocks.compat import versions

_IMPORT_SECONDS = 120
_LOOPBACK_SECONDS = 120


@dataclass(frozen=True)
class Torch:
    """What torch says: why it cannot be imported, the CUDA it is built for, and its GPUs, one text each."""

    trouble: str = ""
    cuda: str = ""
    gpus: Sequence[str] = ()


def version(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed.

    torch and Megatron-Core are asked by their own files: a container's build and a checkout may have no metadata.
    """
    if distribution == "torch":
        return versions.torch_version()
    if distribution == "megatron-core":
        folder = versions.megatron_folder()
        return folder and versions.megatron_version(folder)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def there(module: str) -> bool:
    """Whether a module can be found. Nothing is imported, its parent packages neither: a broken one would tell nothing.

    importlib.util.find_spec imports them, and what they raise is not about ``module``.
    """
    names, places = module.split("."), None
    for number in range(1, len(names) + 1):
        spec = _find(".".join(names[:number]), places)
        if spec is None:
            return False
        places = spec.submodule_search_locations or ()  # none: a module without submodules
    return True


def _find(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """The first finder's answer, as import would ask them: on ``places``, or for None on the path."""
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for finder in finders if (spec := finder.find_spec(name, places)) is not None), None)


def import_trouble(module: str) -> str:
    """Why importing ``module`` fails, empty if it does not."""
    return _python(f"import {module}", lambda done: _last_line(done.stderr) if done.returncode else "")


def _python(program: str, read: Callable[[subprocess.CompletedProcess[str]], str]) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    try:
        return read(subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS))
    except subprocess.TimeoutExpired:
        return f"no answer in {_IMPORT_SECONDS} s"


_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
names = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus]
print(json.dumps({"cuda": torch.version.cuda or "", "gpus": names}))
"""


def ask_torch() -> Torch:
    """Imports torch in a process of its own and asks it."""

    def read(done: subprocess.CompletedProcess[str]) -> str:
        failed = json.dumps({"trouble": _last_line(done.stderr) or f"exit code {done.returncode}"})
        return failed if done.returncode else _last_line(done.stdout)

    answer = _python(_TORCH, read)
    try:
        return Torch(**json.loads(answer))
    except (ValueError, TypeError):
        return Torch(trouble=answer)


def nvidia_devices() -> bool:
    """Whether the system has an NVIDIA GPU, whatever torch can do with it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


_LOOPBACK = """
import datetime, sys, torch
import torch.distributed as dist
backend, rank, size, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
device = "cpu"
if backend == "nccl":
    torch.cuda.set_device(rank)
    device = "cuda"
store = dist.FileStore(path, size)
dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
value = torch.ones(1000, device=device)
dist.all_reduce(value)
assert value.eq(size).all().item()
dist.destroy_process_group()
"""


def loopback_trouble(backend: str, processes: int) -> str:
    """Why ``processes`` processes of this machine cannot sum a tensor over ``backend``; empty if they can."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", _LOOPBACK, backend]
        ends = [str(processes), str(Path(folder) / "store")]
        workers = [
            subprocess.Popen([*command, str(rank), *ends], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        try:
            for worker in workers:
                _, error = worker.communicate(timeout=_LOOPBACK_SECONDS)
                if worker.returncode:
                    return _last_line(error) or f"exit code {worker.returncode}"
        except subprocess.TimeoutExpired:
            return f"no answer in {_LOOPBACK_SECONDS} s"
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.communicate()
    return ""
