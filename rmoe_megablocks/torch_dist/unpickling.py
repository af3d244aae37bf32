"""The index of a checkpoint, ``.metadata``, which is a pickle: read with an allow-list, so that none runs code."""

import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

INDEX = ".metadata"

#: what torch and Megatron write into an index, and nothing else
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (found.__module__, found.__qualname__): found
        for found in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePath,
    ("pathlib._local", "PosixPath"): PurePath,
    **{
        ("torch", str(found).removeprefix("torch.")): found
        for found in vars(torch).values()
        if type(found) is torch.dtype
    },
}


class UnsafePickle(pickle.UnpicklingError):
    """A pickle asks for something that no checkpoint needs; the text names it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafePickle(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickle("a persistent id")


def read_index(checkpoint: Path) -> metadata.Metadata:
    """The index of a checkpoint's folder: names, shapes, dtypes and where in which file they lie.

    Raises:
        UnsafePickle: it names a class or function that an index has no use for. Nothing was imported or called.
        ValueError, pickle.UnpicklingError, ...: it is damaged; what a damaged pickle raises is any exception.
        OSError: it cannot be read.
    """
    with (checkpoint / INDEX).open("rb") as file:
        index = _Unpickler(file).load()
    if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError(f"{INDEX} is no index of a checkpoint")
    for place in index.storage_data.values():
        if PurePath(place.relative_path).name != place.relative_path:  # somebody's file elsewhere
            raise UnsafePickle(f"the file {place.relative_path!r}, outside of its folder")
    return index
