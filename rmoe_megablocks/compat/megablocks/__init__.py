"""MegaBlocks on any current torch, on CPU and GPU, without compiling anything.

MegaBlocks 0.10.0 needs two compiled modules, ``megablocks_ops`` and ``grouped_gemm``. Where one of them is not
installed, :func:`enable` puts a stand-in in plain torch in its place; where there is no GPU it does so in any case,
since the compiled ones take CUDA tensors only. Use it before the first import of MegaBlocks::

    from rmoe_megablocks.compat import megablocks as megablocks_compat

    megablocks_compat.enable()
    from megablocks import Arguments, dMoE

- ``integer_ops``: sort, histogram, cumsum and their like, in the place of ``megablocks_ops``.
- ``grouped_gemm``: in the place of the package of that name.
- ``copies``: MegaBlocks' Triton kernels for CPU tensors; CUDA tensors keep the Triton kernels.
- ``install``: installs MegaBlocks itself, see there for why pip alone cannot.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
import warnings

__all__ = ["SUPPORTED", "check_version", "enable"]

SUPPORTED = "0.10"
"""The MegaBlocks releases that this package was built against."""

_enabled: dict[str, str] | None = None


def check_version() -> None:
    """Raises ImportError, naming the supported releases, unless one of them is installed."""
    try:
        found = importlib.metadata.version("megablocks")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"MegaBlocks {SUPPORTED}.x is needed and is not installed: rmoe install megablocks") from None
    if not found.startswith(SUPPORTED + "."):
        raise ImportError(f"MegaBlocks {SUPPORTED}.x is supported, found {found}: rmoe install megablocks")


def enable() -> dict[str, str]:
    """Makes ``import megablocks`` work here, and imports it. Calling it again changes nothing.

    Returns:
        For ``megablocks_ops`` and ``grouped_gemm``: ``"compiled"`` or ``"stand-in"``.

    Raises:
        ImportError: MegaBlocks is missing or of another release.
        RuntimeError: MegaBlocks was imported earlier, with other modules than those it would get now.
    """
    global _enabled
    if _enabled is not None:
        return dict(_enabled)
    check_version()
    enabled = {}
    for name, stand_in in (("megablocks_ops", "integer_ops"), ("grouped_gemm", "grouped_gemm")):
        enabled[name] = "compiled" if _compiled_module_works(name) else "stand-in"
        if enabled[name] == "stand-in":
            if "megablocks" in sys.modules:
                raise RuntimeError(
                    f"megablocks was imported before {name} had its stand-in: call "
                    "rmoe_megablocks.compat.megablocks.enable() before the first import of megablocks"
                )
            _put_in_place(name, importlib.import_module(f"{__name__}.{stand_in}"))
    if "megablocks" not in sys.modules:
        # What an import that failed for want of megablocks_ops left behind remembers that grouped_gemm is missing.
        for name in [name for name in sys.modules if name.startswith("megablocks.")]:
            del sys.modules[name]
    _dispatch_kernels_by_device()
    _enabled = enabled
    return dict(enabled)


def _compiled_module_works(name: str) -> bool:
    from rmoe_megablocks.compat import megatron_cpu  # imports torch, which installing does without

    if megatron_cpu.needed():
        return False  # a CPU mode's torch.cuda.is_available() would say otherwise
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return False
        reason = error
    except ImportError as error:  # built for another torch
        reason = error
    else:
        return not getattr(module, "__stand_in__", False)
    warnings.warn(f"{name} is installed but cannot be imported, a stand-in takes its place: {reason}", stacklevel=3)
    return False


def _put_in_place(name: str, source: types.ModuleType) -> None:
    """Enters ``source`` under the name ``name``; a spec of that name keeps importlib.util.find_spec working."""
    module = types.ModuleType(name, source.__doc__)
    module.__dict__.update({key: value for key, value in vars(source).items() if not key.startswith("_")})
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__stand_in__ = True
    sys.modules[name] = module


def _dispatch_kernels_by_device() -> None:
    """The operations look the kernels up in this module when called (megablocks/ops/*.py)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")  # megablocks/layers/gelu.py
        from megablocks.backend import kernels

    from rmoe_megablocks.compat.megablocks import copies

    for name in (
        *("gather", "padded_gather", "binned_gather"),
        *("scatter", "padded_scatter", "binned_scatter"),
        *("scatter_wgrad", "padded_scatter_wgrad", "binned_scatter_wgrad"),
    ):
        setattr(kernels, name, _by_device(getattr(kernels, name), getattr(copies, name)))


def _by_device(on_gpu, on_cpu):
    @functools.wraps(on_gpu)
    def kernel(x, *args, **kwargs):
        return (on_cpu if x.device.type == "cpu" else on_gpu)(x, *args, **kwargs)

    return kernel
