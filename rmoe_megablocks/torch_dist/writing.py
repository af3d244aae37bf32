"""A checkpoint written chunk by chunk: memory holds one chunk at a time."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor.

    Attributes:
        name: of the tensor.
        size: of the whole tensor.
        first: indices at which the part begins.
        shape: of the part.
        dtype: of the tensor.
        load: makes the part when it is its turn to be written.
    """

    name: str
    size: tuple[int, ...]
    first: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def index(self) -> MetadataIndex:
        """Its key in the checkpoint's index."""
        return MetadataIndex(self.name, torch.Size(self.first))

    def item(self) -> WriteItem:
        """What torch's writer is asked to write."""
        where = ChunkStorageMetadata(offsets=torch.Size(self.first), sizes=torch.Size(self.shape))
        data = TensorWriteData(where, TensorProperties(dtype=self.dtype), torch.Size(self.size))
        return WriteItem(self.index, WriteItemType.SHARD, tensor_data=data)


def write(checkpoint: Path, chunks: Sequence[Chunk], objects: Mapping[str, Any]) -> None:
    """Writes ``checkpoint``, a new folder: the chunks in their order, behind them ``objects`` by name."""
    writer = FileSystemWriter(checkpoint)
    items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    items += [chunk.item() for chunk in chunks]
    plans, index = create_default_global_save_plan([SavePlan(items)])
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = writer.write_data(plan, _Lazily(chunks, objects)).wait()
    writer.finish(index, [results])


class _Lazily(SavePlanner):
    """Makes what is written when torch's writer asks for it."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, Any]) -> None:
        self._chunks = {chunk.index: chunk for chunk in chunks}
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], content)
            return content
        chunk = self._chunks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        made = chunk.load()
        if made.shape != torch.Size(chunk.shape) or made.dtype != chunk.dtype:
            raise ValueError(f"{chunk.name}: {list(made.shape)} {made.dtype} instead of {list(chunk.shape)}")
        return made.contiguous()

    def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("plans are made by write")  # torch asks for the method and nobody calls it

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan
