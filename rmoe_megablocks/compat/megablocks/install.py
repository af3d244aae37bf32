"""Installs MegaBlocks 0.10.0 and stanford-stk 0.7.1 beside the torch and Megatron-Core that are there.

Plain ``pip install megablocks`` cannot: its pins (torch below 2.7.1, packaging below 24.2) exclude every current
Megatron-Core (databricks/megablocks#159, #165), and its setup.py looks for CUDA: with a toolkit but no GPU it dies,
with CUDA 13 it does not compile (#180). So it is built as the pure-Python package it is at heart, without its
dependencies and with a setup.py that sees a torch without CUDA. What it misses, :func:`.enable` supplies; compiled
``megablocks_ops`` and ``grouped_gemm`` of the user's own are left alone and used.

``pip check`` goes on complaining about the pins. Run ``rmoe install megablocks``, or
``python -m rmoe_megablocks.compat.megablocks.install`` in the environment that is to have it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmoe_megablocks.errors import UsageError

VERSIONS = {"megablocks": "0.10.0", "stanford-stk": "0.7.1"}

# Run in the target environment: which of the names given are there. Takes no import of torch.
_INSPECT = """
import importlib.metadata, importlib.util, json, sys
versions = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions() if d.name}
modules = {name: importlib.util.find_spec(name) is not None for name in ("pip", "setuptools", "torch", "triton")}
print(json.dumps({"versions": versions, "modules": modules}))
"""


def install(python: str | os.PathLike[str] = sys.executable) -> None:
    """Installs MegaBlocks into the environment of the interpreter ``python``; nothing is compiled.

    Does nothing when both packages are there in these versions. Packages come from pip's usual sources (PIP_INDEX_URL,
    PIP_FIND_LINKS and so on are honoured). Triton, which MegaBlocks imports, comes along where torch did not bring it.

    Raises:
        UsageError: no such interpreter, an environment without torch, pip or setuptools, or pip's failure.
    """
    found = _inspect(python)
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items() if found["versions"].get(name) != version]
    if not found["modules"]["triton"]:
        wanted.append("triton")
    if not wanted:
        return
    for module in ("torch", "pip", "setuptools"):
        if not found["modules"][module]:
            raise UsageError(f"MegaBlocks is installed beside torch, pip and setuptools: {python} has no {module}")
    # No cache: it may hold a wheel that was compiled for another torch.
    command = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-cache-dir", *wanted]
    with build_environment() as environment:
        result = _run(command, environment)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines()]
        # what a setup.py ended with comes before pip's summary, which names no reason
        reasons = [line for line in lines if re.match(r"(?i)\w*error: (?!subprocess-exited)", line)]
        reason = reasons[0] if reasons else f"pip ended with {result.returncode}"
        raise UsageError(f"MegaBlocks could not be installed with {python}: {reason} (pip install {' '.join(wanted)})")
    missing = [name for name, version in VERSIONS.items() if _inspect(python)["versions"].get(name) != version]
    if missing:
        raise UsageError(f"pip reported success, yet {python} does not see {', '.join(missing)}")


@contextmanager
def build_environment() -> Iterator[dict[str, str]]:
    """Environment variables under which a setup.py imports a torch without CUDA, and so compiles nothing."""
    with tempfile.TemporaryDirectory(prefix="rmoe-megablocks-") as folder:
        utils = Path(folder, "torch", "utils")
        utils.mkdir(parents=True)
        Path(folder, "torch", "__init__.py").write_text('__version__ = "0"\n')
        (utils / "__init__.py").touch()
        (utils / "cpp_extension.py").write_text("CUDA_HOME = BuildExtension = CUDAExtension = None\n")
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}


def _inspect(python: str | os.PathLike[str]) -> dict[str, dict]:
    result = _run([python, "-c", _INSPECT], dict(os.environ))
    if result.returncode:
        raise UsageError(f"{python} cannot be used: {result.stderr.strip().splitlines()[-1:]}")
    return json.loads(result.stdout)


def _run(command: list, environment: dict[str, str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            list(map(os.fspath, command)), env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be run: {error.strerror}") from None


if __name__ == "__main__":
    try:
        install()
    except UsageError as error:
        sys.exit(f"error: {error}")
