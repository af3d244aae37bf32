"""Experts' weights in the layouts of the two backends, moved exactly, and MegaBlocks' in Megatron's checkpoints.

Megatron keeps two matrices for each expert, MegaBlocks one matrix for all experts of a rank, stacked row by row::

    linear_fc1.weight [F, H], or [2F, H] when gated: gate above up      w1 [E*F, H] (gate), v1 [E*F, H] (up)
    linear_fc2.weight [H, F]                                            w2 [E*F, H]

A checkpoint written with either backend has Megatron's layout: one tensor for all layers and experts, each expert a
shard. So it loads into the other backend, and into another number of expert-parallel ranks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from rmoe_megablocks.errors import UsageError

_MEGABLOCKS = re.compile(r"(?P<experts>.*\bexperts\.)dropless\.mlp\.(?P<name>w1|v1|w2)")
_EXTRA_STATE = re.compile(r".*\bexperts\.(local_experts\.\d+\.linear_fc\d\.)?_extra_state")
_MEGATRON = re.compile(r"(?P<experts>.*\bexperts\.)local_experts\.(?P<index>\d+)\.linear_(?P<name>fc1|fc2)\.weight")


def split_expert(fc1: Tensor, fc2: Tensor, gated: bool) -> dict[str, Tensor]:
    """Megatron's matrices of one expert -> its rows [F, H] of MegaBlocks' matrices by name, as views."""
    names = ("w1", "v1") if gated else ("w1",)
    return dict(zip(names, fc1.chunk(len(names)), strict=True)) | {"w2": fc2.mT}


def join_expert(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`split_expert`: linear_fc1's and linear_fc2's weights, as new tensors."""
    return torch.cat([rows[name] for name in ("w1", "v1") if name in rows]), rows["w2"].mT.contiguous()


def from_megatron(state: Mapping[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """A rank's model state dict with Megatron's experts -> the same with MegaBlocks'.

    Entries of other modules are passed on, experts' empty _extra_state entries left out.
    """
    result, found = {}, {}
    for key, value in state.items():
        match = _MEGATRON.fullmatch(key)
        if match:
            found.setdefault(match["experts"], {}).setdefault(int(match["index"]), {})[match["name"]] = value
        elif not _EXTRA_STATE.fullmatch(key):
            result[key] = value
    for prefix, experts in found.items():
        rows = [split_expert(experts[i]["fc1"], experts[i]["fc2"], gated) for i in range(len(experts))]
        for name in rows[0]:
            result[f"{prefix}dropless.mlp.{name}"] = torch.cat([expert[name] for expert in rows])
    return result


def to_megatron(state: Mapping[str, Tensor], num_local_experts: int) -> dict[str, Tensor]:
    """The inverse of :func:`from_megatron`."""
    result, found = {}, {}
    for key, value in state.items():
        match = _MEGABLOCKS.fullmatch(key)
        if match:
            found.setdefault(match["experts"], {})[match["name"]] = value.chunk(num_local_experts)
        elif not _EXTRA_STATE.fullmatch(key):
            result[key] = value
    for prefix, stacks in found.items():
        for i in range(num_local_experts):
            fc1, fc2 = join_expert({name: stack[i] for name, stack in stacks.items()})
            result[f"{prefix}local_experts.{i}.linear_fc1.weight"] = fc1
            result[f"{prefix}local_experts.{i}.linear_fc2.weight"] = fc2
    return result


@dataclass(frozen=True)
class ExpertShards:
    """Where a rank's experts lie in a checkpoint.

    Attributes:
        prefix: of the experts' keys in the checkpoint.
        offsets: of the layer, as Megatron hands them to sharded_state_dict.
        first: number of the rank's first expert among all.
        local: experts on the rank.
        total: experts of the layer.
        replica_id: which of the ranks with these same experts this one is.
        singleton: whether each expert has a key of its own (Megatron's metadata "singleton_local_shards").
    """

    prefix: str
    offsets: tuple
    first: int
    local: int
    total: int
    replica_id: tuple[int, int, int]
    singleton: bool

    def factories(self, parameters: Mapping[str, Tensor], prefix: str) -> ShardedStateDict:
        """A factory for each of w1, v1 (if gated) and w2, under the names ``prefix`` + name.

        Factories, because the optimizers describe their own state by calling them with another tensor.
        """
        gated = "v1" in parameters
        return {prefix + name: self._factory(name, parameter, gated) for name, parameter in parameters.items()}

    def _factory(self, name: str, parameter: Tensor, gated: bool) -> ShardedTensorFactory:
        transposed = name == "w2"
        linear = "linear_fc2" if transposed else "linear_fc1"
        half = {"w1": 0, "v1": 1}.get(name) if gated else None

        @torch.no_grad()
        def build(key: str, tensor: Tensor, replica_id: tuple, flattened_range: slice | None) -> list[ShardedTensor]:
            if flattened_range is not None:
                # Megatron's own tensors raise as well (mapping.py:134), without saying what to do
                raise UsageError(
                    f"--load: the optimizer's state ({key}) has the format of an older Megatron, which this one does "
                    "not load any more; add --no-load-optim"
                )
            shards = []
            for expert, rows in enumerate(tensor.chunk(self.local), self.first):
                matrix = rows.mT.contiguous() if transposed else rows
                shards.append(self._shard(key, matrix, expert, half, replica_id))
            return shards

        @torch.no_grad()
        def merge(shards: list[Tensor]) -> Tensor:
            return torch.cat([shard.mT for shard in shards] if transposed else shards)

        return ShardedTensorFactory(f"{self.prefix}{linear}.weight", parameter, build, merge, self.replica_id)

    def extra_states(self) -> list[ShardedObject]:
        """The empty entries that Megatron's linear layers write, and miss in a checkpoint without them."""
        result = []
        for expert in range(self.first, self.first + self.local):
            for linear in ("linear_fc1", "linear_fc2"):
                key, offsets = self._place(f"{self.prefix}{linear}._extra_state", expert)
                result.append(make_sharded_object_for_checkpoint(None, key, offsets, replica_id=self.replica_id))
        return result

    def _place(self, key: str, expert: int) -> tuple[str, tuple]:
        """An expert's key and offsets in the checkpoint. ``key`` may begin with an optimizer's prefix."""
        if self.singleton:
            return key.replace(self.prefix, f"{self.prefix}{expert}.", 1), self.offsets
        return key, (*self.offsets, (len(self.offsets), expert, self.total))

    def _shard(self, key: str, matrix: Tensor, expert: int, half: int | None, replica_id: tuple) -> ShardedTensor:
        """One expert's matrix, or its ``half`` of linear_fc1: gate 0, up 1."""
        key, offsets = self._place(key, expert)
        axes = len(offsets)
        if half is not None:
            if self.singleton:  # Megatron's names for the two
                key = f"{key}_{'wv'[half]}"
            else:
                offsets = (*offsets, (axes, half, 2))
        return ShardedTensor.from_rank_offsets(key, matrix, *offsets, replica_id=replica_id, prepend_axis_num=axes)
