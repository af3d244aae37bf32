"""Weights in files of a bounded size, one after the other; a killed export goes on behind the last complete one."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rmoe_megablocks.conversion.folder.checksums import CHECKSUMS, sha256
from rmoe_megablocks.conversion.mapping.checkpoint import Source, Weights
from rmoe_megablocks.megatron.checkpoints.files import write_atomically

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PADDING = "megatron_padding.safetensors"
PROGRESS = "progress.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Shard:
    """One file: what is in it, and how many bytes of tensors."""

    file: str
    sources: Sequence[Source]
    size: int


def read_size(text: str) -> int:
    """Bytes of a size as 4GB, 500MB or 2GiB. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size: expected as 4GB, 500MB or 2GiB")
    return size


def plan(weights: Weights, largest: int) -> list[Shard]:
    """Which tensors go into which file: in order, as many as fit into ``largest`` bytes, at least one entry."""
    groups: list[list[Source]] = []
    sizes: list[int] = []
    for source in weights.sources:
        size = source.dtype.itemsize * _elements(source)
        if not groups or sizes[-1] + size > largest:
            groups.append([])
            sizes.append(0)
        groups[-1].append(source)
        sizes[-1] += size
    names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    names = [SINGLE] if len(groups) == 1 else names
    return [Shard(name, group, size) for name, group, size in zip(names, groups, sizes, strict=True)]


def _elements(source: Source) -> int:
    count = 1
    for length in source.entry.shape:
        count *= length
    return count


def write(folder: Path, shards: Sequence[Shard], weights: Weights, source: str, step: Callable[[int], None]) -> None:
    """Writes all files that ``folder`` does not have yet, and the index.

    Args:
        source: what the files are made of; files of another one are written anew.
        step: called with the bytes of every file that is there.
    """
    done = _progress(folder, source)
    for shard in shards:
        path = folder / shard.file
        if path.is_file() and done.get(shard.file) == sha256(path):
            step(shard.size)
            continue
        tensors: dict[str, Tensor] = {}
        for found in shard.sources:
            tensors.update(zip(found.entry.names, weights.read(found), strict=True))
        _save(tensors, path)
        del tensors
        done[shard.file] = sha256(path)
        write_atomically(folder / PROGRESS, json.dumps({"source": source, "files": done}))
        step(shard.size)
    if len(shards) > 1:
        total = {"total_size": sum(shard.size for shard in shards)}
        names = {name: shard.file for shard in shards for found in shard.sources for name in found.entry.names}
        write_atomically(folder / INDEX, json.dumps({"metadata": total, "weight_map": names}, indent=2) + "\n")
    padding = {found.entry.names[0]: weights.read_padding(found) for found in weights.sources if found.padding}
    if padding:
        _save(padding, folder / PADDING)


def _progress(folder: Path, source: str) -> dict[str, str]:
    """Checksums of the files that an earlier export of the same source has completed."""
    try:
        said = json.loads((folder / PROGRESS).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return dict(said["files"]) if said.get("source") == source else {}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Written beside its place and moved there: a kill leaves no half file under the name of a whole one."""
    new = path.with_name(path.name + ".new")
    save_file(tensors, new, metadata={"format": "pt"})
    mask = os.umask(0)  # safetensors makes files that nobody else may read
    os.umask(mask)
    new.chmod(0o666 & ~mask)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


def write_checksums(folder: Path, left_out: Callable[[str], bool] = lambda name: False) -> None:
    """SHA256SUMS of the files of ``folder``, as ``sha256sum -c`` reads it, but of those ``left_out``."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != CHECKSUMS and not left_out(name)]
    write_atomically(folder / CHECKSUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))
