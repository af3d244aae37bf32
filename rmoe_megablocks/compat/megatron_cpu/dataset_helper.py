"""The compiled helper of Megatron's datasets, for a checkout that has none.

Megatron compiles it with make and pybind11 when training starts, and ends if that fails (datasets/utils.py:20). The
wheel ships it compiled, without a Makefile, but a checkout on the path hides the wheel. In this order: what lies in
the checkout; the wheel's, if made from the same source; one compiled into the checkout, as make does, with the
pybind11 that torch ships.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch

from rmoe_megablocks.errors import UsageError

MODULE = "megatron.core.datasets.helpers_cpp"
_SOURCE = "helpers.cpp"
_FLAGS = ("-O3", "-shared", "-std=c++17", "-fPIC")  # the Makefile's


class _HelperOfTheWheel(MetaPathFinder):
    """Asked last, when the datasets' own folder has no compiled helper."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != MODULE or not path:
            return None
        file = of_wheel(Path(next(iter(path))))
        return file and importlib.util.spec_from_file_location(fullname, file)


def install() -> None:
    """Lets every process of a run find the wheel's helper."""
    if not any(isinstance(finder, _HelperOfTheWheel) for finder in sys.meta_path):
        sys.meta_path.append(_HelperOfTheWheel())


def is_there() -> bool:
    """Whether the helper can be imported."""
    return importlib.util.find_spec(MODULE) is not None


def of_wheel(datasets: Path) -> Path | None:
    """The installed wheel's compiled helper, if its source is the one in the folder ``datasets``."""
    try:
        distribution = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(distribution.locate_file("megatron/core/datasets"))
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = folder / f"helpers_cpp{suffix}"
        if file.is_file() and _text(folder / _SOURCE) == _text(datasets / _SOURCE):
            return file
    return None


def compile_into(datasets: Path) -> Path:
    """Compiles the helper into the folder ``datasets``; its file.

    Raises:
        UsageError: no compiler, no headers, or no right to write there.
    """
    file = datasets / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    draft = file.with_name(f"{file.name}.{os.getpid()}.new")
    headers = [sysconfig.get_path("include"), str(Path(torch.__file__).parent / "include")]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *_FLAGS, *(f"-I{folder}" for folder in headers), str(datasets / _SOURCE), "-o", str(draft)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            draft.replace(file)
            importlib.invalidate_caches()
            return file
        reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [f"exit {done.returncode}"]
    except OSError as error:
        reasons = [f"{error.filename or compiler}: {error.strerror}"]
    finally:
        draft.unlink(missing_ok=True)
    raise UsageError(
        f"{datasets / _SOURCE}, which Megatron's datasets need, cannot be compiled ({reasons[0].strip()[:200]}): "
        "install a C++ compiler and Python's headers, or megatron-core, whose wheel has it compiled"
    )


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
