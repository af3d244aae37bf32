"""Refuses a torch or Megatron-Core that cannot work, in one line, before either is imported."""

import os
import subprocess
import sys
from pathlib import Path

from rmoe_megablocks.compat import self_check, versions
from rmoe_megablocks.errors import CommonError

_MARK = "RMOE_CHECKED_UPSTREAMS"  # inherited: what the launcher has checked, its ranks need not check again
_SHOWN = 4  # names in one line


class UnsupportedUpstream(ImportError, CommonError):
    """torch or Megatron-Core is missing, too old, or lacks a name, or its checks are switched off; one line."""


def check() -> None:
    """Looks at the torch and the Megatron-Core that would be imported.

    A release newer than any that was tried gets one warning for the whole run, and goes on if it has every name that
    is used (:mod:`.self_check`).

    Raises:
        UnsupportedUpstream: one of them cannot work.
    """
    if not __debug__:
        raise UnsupportedUpstream(
            "Python runs without assertions (-O, or PYTHONOPTIMIZE is set), which are how Megatron refuses arguments "
            "that cannot work: leave that out"
        )
    torch, folder = versions.torch_version(), versions.megatron_folder()
    if torch is None:
        raise UnsupportedUpstream(f"torch is not installed ({sys.executable}): pip install torch")
    if versions.is_older(torch, versions.TORCH):
        raise UnsupportedUpstream(
            f"torch {torch} is too old, {versions.text(versions.TORCH)} are supported: pip install --upgrade torch"
        )
    if folder is None:
        raise UnsupportedUpstream(f"megatron-core is not installed ({sys.executable}): {_pip()}")
    megatron = versions.megatron_version(folder)
    if versions.is_older(megatron, versions.MEGATRON):
        raise UnsupportedUpstream(_too_old(folder, megatron))
    checked = f"{torch} {megatron} {folder}"
    if os.environ.get(_MARK) == checked:
        return
    if versions.release(megatron) != versions.MEGATRON[0]:  # in the lowest release the tests look for the names
        _check_names(folder, megatron)
    os.environ[_MARK] = checked
    python = ".".join(map(str, sys.version_info[:3]))
    for name, found, bounds in (
        ("Python", python, versions.PYTHON),
        ("torch", torch, versions.TORCH),
        ("Megatron-Core", megatron, versions.MEGATRON),
    ):
        if versions.is_newer(found, bounds) and int(os.environ.get("RANK", "0")) == 0:
            tried = versions.text(bounds)
            print(f"rmoe: warning: {name} {found} was never tried, {tried} were", file=sys.stderr, flush=True)


def prefer_megatron_beside(script: Path) -> None:
    """Has Python look into a script's folder first, as it does for a script that it runs itself."""
    if script.is_file():
        sys.path.insert(0, str(script.resolve().parent))


def _check_names(folder: Path, version: str) -> None:
    missing = self_check.missing_names(folder)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UnsupportedUpstream(
            f"Megatron-Core {version} in {folder.parent} lacks {'; '.join(missing[:_SHOWN])}{more}: {_instead(folder)}"
        )


def _too_old(folder: Path, version: str) -> str:
    tag = _git_tag(folder.parent)
    found = f"Megatron-Core {version}" + (f" (git: {tag})" if tag else "")
    return (
        f"{found} in {folder.parent} is too old, {versions.text(versions.MEGATRON)} are supported: {_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    if any(folder.parent.glob("megatron_core-*.dist-info")):
        return _pip()
    return f"check out the tag {versions.MEGATRON_TAG} or the main branch there"


def _pip() -> str:
    return f"pip install 'megatron-core~={'.'.join(map(str, versions.MEGATRON[0]))}.0'"


def _git_tag(folder: Path) -> str:
    """What git calls the commit that is checked out in a folder; empty where git does not know."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--tags", "--always"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk: it is said in a message alone
        return ""
