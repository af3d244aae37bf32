"""A Megatron checkpoint as the entries of the key map: every key accounted for, every part read by layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmoe_megablocks.conversion.mapping.weights import LAYERS, Entry
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.torch_dist.reading import Reader

#: what belongs to training and not to the model: left out without a word
_OF_TRAINING = re.compile(r"(optimizer\.|chained_|opt_param_scheduler|rng_state/|rerun_state_machine|common_state/).*")
_EXTRA_STATE = re.compile(r".*\._extra_state(/shard_[\d._]+)?")
#: what the model has and the folder has not: told by name
_LEFT_OUT = re.compile(r"mtp\..*")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Source:
    """Where an entry lies.

    Attributes:
        key: name of the tensor in the checkpoint.
        first: index of the layer in it, empty where the layer has a tensor of its own.
        dtype: of the tensor.
        padding: rows behind the entry's own, which Megatron added to the vocabulary.
    """

    entry: Entry
    key: str
    first: tuple[int, ...]
    dtype: torch.dtype
    padding: int = 0


@dataclass(frozen=True)
class Weights:
    """The model's weights in a checkpoint.

    Attributes:
        sources: of every entry, in order.
        left_out: names of multi-token prediction's tensors, which the written model has not.
    """

    reader: Reader
    sources: Sequence[Source]
    left_out: Sequence[str] = field(default_factory=tuple)

    def read(self, source: Source) -> tuple[Tensor, ...]:
        """The tensors that are written of an entry."""
        shape = source.entry.shape
        whole = self.reader.read(source.key, source.first, (*(1 for _ in source.first), *shape)).view(shape)
        return tuple(part.contiguous() for part in source.entry.split(whole))

    def read_padding(self, source: Source) -> Tensor:
        """The rows that Megatron added."""
        rows, *others = source.entry.shape
        return self.reader.read(source.key, (rows,), (source.padding, *others))


def find(reader: Reader, entries: Sequence[Entry], config: Mapping[str, Any]) -> Weights:
    """Finds every entry in a checkpoint, and an entry for every tensor of the checkpoint.

    Raises:
        UsageError: one line that names what is missing, of another size or precision, or not known.
    """
    sources, problems, layers = [], [], config["num_hidden_layers"]
    for entry in entries:
        source = _find(reader, entry, layers)
        sources.append(source) if isinstance(source, Source) else problems.append(source)
    if problems:
        _refuse(reader.checkpoint, problems)
    known = {source.key for source in sources}
    others = [name for name in (*reader.tensors, *reader.objects) if name not in known]
    others = [name for name in others if not (_OF_TRAINING.fullmatch(name) or _EXTRA_STATE.fullmatch(name))]
    left_out = tuple(sorted(name for name in others if _LEFT_OUT.fullmatch(name)))
    unknown = sorted(set(others) - set(left_out))
    if unknown:
        _refuse(reader.checkpoint, [f"{name} has no place in the written model" for name in unknown])
    return Weights(reader, sources, left_out)


def _find(reader: Reader, entry: Entry, layers: int) -> Source | str:
    """The source of an entry, or what is wrong."""
    stacked = entry.layer is not None
    for key in entry.keys:
        whole = f"{LAYERS}{key}" if stacked else key
        own = f"{LAYERS}{entry.layer}.{key}" if stacked else key
        for name, first, front in ((whole, (entry.layer,), (layers,)), (own, (), ())):
            if name not in reader.tensors or (first and not stacked):
                continue
            stored = reader.tensors[name]
            expected = (*front, *entry.shape) if first else entry.shape
            padding = stored.size[0] - expected[0] if entry.rows and len(stored.size) == len(expected) else 0
            if tuple(stored.size) != (expected[0] + max(padding, 0), *expected[1:]):
                return f"{name} is {list(stored.size)}, the run's arguments make it {list(expected)}"
            dtype = stored.properties.dtype
            if dtype not in ((entry.dtype,) if entry.dtype else DTYPES):
                return f"{name} is of {dtype}, expected {entry.dtype or 'fp32, bf16 or fp16'}"
            return Source(entry, name, first, dtype, max(padding, 0))
    first_name = f"{LAYERS}{entry.layer}.{entry.keys[0]}" if stacked else entry.keys[0]
    return f"{first_name} is missing"


def _refuse(checkpoint: Path, problems: list[str]) -> None:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise UsageError(f"{checkpoint}: {'; '.join(problems[:3])}{more}")
