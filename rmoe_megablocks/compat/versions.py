"""The releases of Python, torch and Megatron-Core that this package was run with, and what becomes of others.

Only the standard library, and nothing newer than Python 3.7: launch/environment.sh runs this file by its path, with
whatever Python it finds, to judge that Python's environment before anything is imported.
"""

import ast
import os
import re
from importlib.util import find_spec
from pathlib import Path

#: (lowest, highest) release, both included. Lower ones are refused, higher ones get a warning.
PYTHON = ((3, 12), (3, 13))
TORCH = ((2, 9), (2, 15))
MEGATRON = ((0, 19), (0, 20))
MEGATRON_TAG = "core_v0.19.0"


def release(version):
    """The leading two numbers of a version, a container's "2.11.0a0+abc.nv25.10" included; None without any."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version or "")
    return tuple(map(int, numbers.groups())) if numbers else None


def text(bounds):
    """A pair of releases as a reader wants it: "2.9 to 2.15"."""
    low, high = (".".join(map(str, bound)) for bound in bounds)
    return low if low == high else f"{low} to {high}"


def is_older(version, bounds):
    """Whether a version, or what cannot be read as one, lies below the lowest release."""
    found = release(version)
    return found is None or found < bounds[0]


def is_newer(version, bounds):
    """Whether a version lies above the highest release that was tried."""
    found = release(version)
    return found is not None and found > bounds[1]


def torch_version():
    """torch's version from its own file, without importing it; None without torch.

    Not from the metadata: a container's build may have none.
    """
    folder = _folder("torch")
    return folder and _assigned(folder / "version.py", "__version__")


def megatron_folder():
    """The folder "megatron" that would be imported; None without Megatron-Core.

    Found without importing anything, which is for CPU mode to prepare; a checkout on the path beats an installed
    Megatron, as it does when it is imported.
    """
    spec = find_spec("megatron")
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    return next((folder for folder in folders if (folder / "core" / "package_info.py").is_file()), None)


def megatron_version(folder):
    """The version of the Megatron-Core in a folder "megatron", as "0.20.0rc1"."""
    file = folder / "core" / "package_info.py"
    numbers = [_assigned(file, name) for name in ("MAJOR", "MINOR", "PATCH")]
    if None in numbers:
        return "unknown"
    return ".".join(map(str, numbers)) + (_assigned(file, "PRE_RELEASE") or "")


def _folder(module):
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # a module in the path that breaks, or has no specification
        return None
    return Path(os.path.dirname(spec.origin)) if spec and spec.origin else None


def _assigned(file, name):
    """The literal that a file assigns to a name."""
    try:
        found = re.search(rf"^{name}\b[^=\n]*= *(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return ast.literal_eval(found.group(1).partition(" #")[0].strip()) if found else None
    except (OSError, ValueError, SyntaxError):
        return None
