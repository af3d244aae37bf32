"""A checkpoint's tensors and objects by name, in slices: memory holds what was asked for and one stored chunk."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.serialization import get_unsafe_globals_in_checkpoint

from rmoe_megablocks.torch_dist.unpickling import UnsafePickle, read_index

#: Megatron's name for everything that no rank has for itself: the run's arguments, the iteration, schedules
COMMON_STATE = "common_state/shard_0_1"


class Reader:
    """What one checkpoint's folder holds.

    Attributes:
        tensors: shape, dtype and chunks of every tensor by name; shapes are global, whatever the layout that saved it.
        objects: names of everything else.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Reads the index. Raises as :func:`.unpickling.read_index`."""
        self.checkpoint = checkpoint
        index = read_index(checkpoint)
        self.tensors: Mapping[str, TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[name] = entry
            elif isinstance(entry, BytesStorageMetadata):
                self.objects.append(name)
        self._reader = FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(index, is_coordinator=True)

    def read(self, name: str, first: Sequence[int] = (), shape: Sequence[int] | None = None) -> Tensor:
        """The part of a tensor that begins at the indices ``first`` and is ``shape`` large; by default all of it."""
        entry = self.tensors[name]
        size = entry.size if shape is None else torch.Size(shape)
        offsets = torch.Size([*first, *[0] * (len(size) - len(first))])
        wanted = [ChunkStorageMetadata(offsets=offsets, sizes=size)]
        items = create_read_items_for_chunk_list(name, entry, wanted)
        if sum(item.lengths.numel() for item in items) != size.numel():
            raise ValueError(f"{name}: the stored chunks do not cover it")
        if len(items) == 1:
            whole = _Kept(size)
            self._reader.read_data(LoadPlan(items), _Into(whole, offsets))
            return whole.tensor
        target = torch.empty(size, dtype=entry.properties.dtype)
        self._reader.read_data(LoadPlan(items), _Into(target, offsets))
        return target

    def read_object(self, name: str) -> object:
        """What is stored under a name of :attr:`objects`.

        Raises:
            UnsafePickle: it asks for a class or function that torch's and Megatron's allow-lists lack.
        """
        # Late, as Megatron is. At each call: torch's safe_globals(), with which transformers' Trainer resumes, takes
        # out of the list, at its end, also what was there before it: NumPy's arrays among them.
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        stored, index, nowhere = _Bytes(), MetadataIndex(name), torch.Size([0])
        item = ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)
        self._reader.read_data(LoadPlan([item]), stored)
        return load_object(stored.content)

    def check_objects(self) -> None:
        """Reads all of :attr:`objects`, for whoever unpickles them without an allow-list. Raises UnsafePickle."""
        for name in self.objects:
            self.read_object(name)


def load_object(content: bytes) -> object:
    """torch.load(weights_only=True), with an :class:`UnsafePickle` that names what was asked for."""
    try:
        unsafe = get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception:  # old or damaged: the load below, with its own list, says so
        unsafe = []
    if unsafe:
        raise UnsafePickle(min(unsafe))
    with warnings.catch_warnings(action="ignore"):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Kept:
    """Stands for the tensor that is read into, and keeps what is read: memory holds it once and not twice."""

    def __init__(self, size: torch.Size) -> None:
        self._size = size
        self.tensor = torch.empty(0)

    def detach(self) -> "_Kept":
        return self

    def size(self) -> torch.Size:
        return self._size

    def copy_(self, read: Tensor) -> None:
        self.tensor = read if read.untyped_storage().nbytes() == read.nbytes else read.clone()  # not a part of more


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor | _Kept, offsets: torch.Size) -> None:
        self._target, self._offsets = target, offsets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor | _Kept:
        part = self._target
        if isinstance(part, _Kept):
            return part
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is no tensor")

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("plans are made by Reader")  # torch asks for the method and nobody calls it

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


class _Bytes(_Into):
    """Keeps the bytes of one object."""

    def __init__(self) -> None:
        self.content = b""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value.getvalue()
