"""What ``torch.cuda`` answers in CPU mode, and devices named cuda that mean the CPU.

Plain functions replace plain functions here. A ``TorchFunctionMode`` would catch more with less code, but it slows
down every operation of the model, whereas these wrappers cost a fraction of a microsecond on the calls they wrap.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.utils._device

CPU = torch.device("cpu")

# Functions of torch and methods of Tensor that take a device by keyword. Megatron makes its tensors with these.
_FACTORIES = """
    arange as_tensor empty empty_like empty_strided eye from_numpy full full_like linspace logspace ones ones_like rand
    rand_like randint randint_like randn randn_like randperm scalar_tensor tensor zeros zeros_like
"""
_NEW_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"

# Names of CPU tensor types, and those that Megatron's optimizers look for.
_CUDA_TYPE_NAMES = {
    f"torch.{name}Tensor": f"torch.cuda.{name}Tensor" for name in ("Float", "Half", "BFloat16", "Double")
}


def to_cpu(device: Any) -> Any:
    """Return the CPU for anything that names a CUDA device (a string, an index or a device), else the argument."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, int):
        return CPU
    return device


def _with_device(function: Callable) -> Callable:
    """Wrap a function with a ``device`` keyword. Pinned memory needs a driver, so it goes as well."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = to_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _install_factories() -> None:
    # Some upstream calls name the device "cuda" instead of asking for the current one (training.py:1137).
    # torch keeps a list of its factories for "with torch.device(...)": make it before the wrappers hide them.
    torch.utils._device._device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, _with_device(getattr(torch, name)))
    for name in _NEW_METHODS.split():
        setattr(torch.Tensor, name, _with_device(getattr(torch.Tensor, name)))


def _install_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self, *args, **kwargs):
        # Module.to and Module.cuda end here as well.
        if args and isinstance(args[0], (str, int, torch.device)):
            args = (to_cpu(args[0]), *args[1:])
        elif kwargs and "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    def cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
        return self

    def pin_memory(self, device=None):
        return self

    @functools.wraps(original_type)
    def type_(self, dtype=None, *args, **kwargs):
        # The optimizers sort parameters by the name of their CUDA type (optimizer.py:1009, distrib_optimizer.py:401).
        if dtype is None:
            name = original_type(self)
            return _CUDA_TYPE_NAMES.get(name, name)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = cuda
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.type = type_
    # A side stream keeps a tensor from being reused too early; without streams there is nothing to keep
    # (moe_utils.py:1188).
    torch.Tensor.record_stream = lambda self, stream: None


class Stream:
    """A stream that does everything at once, in order."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass


class Event:
    """An event that is reached when it is recorded; it knows the time, for Megatron's timers."""

    def __init__(self, *args, **kwargs) -> None:
        self._time = 0.0

    def elapsed_time(self, end: Event) -> float:
        return (end._time - self._time) * 1000.0

    def query(self) -> bool:
        return True

    def record(self, stream: Stream | None = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass


def _nothing(*args, **kwargs) -> None:
    pass


@contextlib.contextmanager
def _nothing_inside(*args, **kwargs) -> Iterator[None]:
    yield


def peak_memory(device: Any = None) -> int:
    """Return the largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes elsewhere


def current_memory(device: Any = None) -> int:
    """Return the resident set of this process in bytes, or its peak where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory()


def total_memory() -> int:
    """Return the memory of the machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_stats(device: Any = None) -> dict[str, int]:
    # Megatron logs entries by name (training.py:2742); those without a meaning here are 0.
    stats: dict[str, int] = defaultdict(int)
    for kind in ("allocated", "reserved"):
        stats[f"{kind}_bytes.all.current"] = current_memory()
        stats[f"{kind}_bytes.all.peak"] = peak_memory()
    return stats


def _device_count() -> int:
    # As torchrun would give one GPU to each process; initialize.py:266 and 447 skip their work when it is 0.
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_properties(device: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="CPU", major=8, minor=0, total_memory=total_memory(), multi_processor_count=os.cpu_count() or 1
    )


def _install_cuda() -> None:
    cuda = torch.cuda
    replacements = {
        # Megatron asserts a GPU and skips process groups and seeds without (initialize.py:66, 267, 359, 447).
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        # The RNG functions queue their work with this until CUDA is up, which never happens (random.py:174).
        "_lazy_call": lambda function, **kwargs: function(),
        "device_count": _device_count,
        # Not an index: it goes straight into "device=" in about 140 places of Megatron.
        "current_device": lambda: CPU,
        "set_device": _nothing,
        "device": _nothing_inside,
        "get_device_name": lambda device=None: "CPU",
        "get_device_properties": _device_properties,
        # Ampere's: enough for bf16, too old for fp8.
        "get_device_capability": lambda device=None: (8, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        # Streams and events order what already is in order (schedules, DDP buffers, dispatchers, timers).
        "Stream": Stream,
        "ExternalStream": Stream,
        "Event": Event,
        "stream": _nothing_inside,
        "set_stream": _nothing,
        "current_stream": lambda device=None: _STREAM,
        "default_stream": lambda device=None: _STREAM,
        "synchronize": _nothing,
        "_sleep": _nothing,
        # Optimizers of torch ask for it once CUDA is available.
        "is_current_stream_capturing": lambda: False,
        # Statistics that the training log and the timers print (training.py:2742, common_utils.py:323).
        "memory_allocated": current_memory,
        "memory_reserved": current_memory,
        "max_memory_allocated": peak_memory,
        "max_memory_reserved": peak_memory,
        "memory_stats": _memory_stats,
        "device_memory_used": current_memory,
        "mem_get_info": lambda device=None: (max(total_memory() - current_memory(), 0), total_memory()),
        "reset_peak_memory_stats": _nothing,
        "reset_max_memory_allocated": _nothing,
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "utilization": lambda device=None: 0,
        "temperature": lambda device=None: 0,
        "power_draw": lambda device=None: 0,
        "clock_rate": lambda device=None: 0,
        # The profiler hooks call the runtime directly (training.py).
        "cudart": lambda: types.SimpleNamespace(cudaProfilerStart=_nothing, cudaProfilerStop=_nothing),
        "check_error": _nothing,
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    for name in ("Float", "Half", "BFloat16"):
        # isinstance checks of mixed precision (transformer/module.py:20).
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing)
    cuda.nvtx.range = _nothing_inside


def _install_accelerator() -> None:
    # The DataLoader asks torch.accelerator, not torch.cuda, whether to start a thread that pins memory, and that
    # thread dies without a driver. current_accelerator picks kernels by device type.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None
    torch.accelerator.device_count = lambda: 0


def _compile(model: Callable | None = None, **kwargs) -> Callable:
    """Stand in for ``torch.compile``, as a function or a decorator with arguments: compile nothing."""
    return (lambda function: function) if model is None else model


def _disable_compile() -> None:
    # Megatron compiles its fusions when it is imported (core/jit.py:21), which on the CPU needs a C++ compiler and
    # takes minutes. The variable is for child processes. dynamo tabulates the functions of torch when it is imported
    # and stumbles over functions with several names, so it has to see the real ones.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True
    torch.compile = _compile


def _set_environment() -> None:
    # Megatron insists on it with tensor or context parallelism (arguments.py:1437); it orders kernels of a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


_STREAM = Stream()


def install() -> None:
    """Apply everything above."""
    _set_environment()
    _disable_compile()
    _install_factories()
    _install_tensor_methods()
    _install_cuda()
    _install_accelerator()
