"""Experts' weights in the layouts of the two backends, moved exactly, and MegaBlocks' in Megatron's checkpoints.

Megatron keeps two matrices for each expert, MegaBlocks one matrix for all experts of a rank, stacked row by row::

    linear_fc1.weight [F, H], or [2F, H] when gated: gate above up      w1 [E*F, H] (gate), v1 [E*F, H] (up)
    linear_fc2.weight [H, F]                                            w2 [E*F, H]

A checkpoint written with either backend has Megatron's layout: one tensor for all layers and experts, each expert a
shard. So it loads into the other backend, and into another number of expert-parallel ranks.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from torch import Tensor

_MEGABLOCKS = re.compile(r"(?P<experts>.*\bexperts\.)dropless\.mlp\.(?P<name>w1|v1|w2)")
_MEGATRON = re.compile(r"(?P<experts>.*\bexperts\.)local_experts\.(?P<index>\d+)\.linear_(?P<name>fc1|fc2)\.weight")


def split_expert(fc1: Tensor, fc2: Tensor, gated: bool) -> dict[str, Tensor]:
    """Megatron's matrices of one expert -> its rows [F, H] of MegaBlocks' matrices by name, as views."""
    names = ("w1", "v1") if gated else ("w1",)
    return dict(zip(names, fc1.chunk(len(names)), strict=True)) | {"w2": fc2.mT}


def join_expert(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`split_expert`: linear_fc1's and linear_fc2's weights, as new tensors."""
    return torch.cat([rows[name] for name in ("w1", "v1") if name in rows]), rows["w2"].mT.contiguous()


def from_megatron(state: Mapping[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """A rank's model state dict with Megatron's experts -> the same with MegaBlocks'. Other entries are passed on."""
    result, found = {}, {}
    for key, value in state.items():
        match = _MEGATRON.fullmatch(key)
        if match:
            found.setdefault(match["experts"], {}).setdefault(int(match["index"]), {})[match["name"]] = value
        else:
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
        else:
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
        halves = 2 if "v1" in parameters else 1
        parts = {"w1": ("linear_fc1", 0), "v1": ("linear_fc1", 1), "w2": ("linear_fc2", None)}
        return {
            prefix + name: self._factory(parameter, *parts[name], halves) for name, parameter in parameters.items()
        }

    def _factory(self, parameter: Tensor, linear: str, half: int | None, halves: int) -> ShardedTensorFactory:
        transposed = half is None

        @torch.no_grad()
        def build(key: str, tensor: Tensor, replica_id: tuple, flattened_range: slice | None) -> list[ShardedTensor]:
            if flattened_range is not None:
                raise NotImplementedError(f"{key}: flattened optimizer shards (use torch_dist's current formats)")
            shard = self._transposed_shard if transposed else self._half_shard(half, halves)
            return [
                shard(key, rows, self.first + i, replica_id) for i, rows in enumerate(tensor.chunk(self.local))
            ]

        @torch.no_grad()
        def merge(shards: list[Tensor]) -> Tensor:
            return torch.cat([shard.mT for shard in shards] if transposed else shards)

        return ShardedTensorFactory(f"{self.prefix}{linear}.weight", parameter, build, merge, self.replica_id)

    def _transposed_shard(self, key: str, rows: Tensor, expert: int, replica_id: tuple) -> ShardedTensor:
        return self._shard(key, rows.mT.contiguous(), expert, replica_id)

    def _half_shard(self, half: int, halves: int) -> Callable[..., ShardedTensor]:
        def shard(key: str, rows: Tensor, expert: int, replica_id: tuple) -> ShardedTensor:
            if halves == 1:
                return self._shard(key, rows, expert, replica_id)
            if self.singleton:  # Megatron's names for the two halves
                return self._shard(f"{key}_{'wv'[half]}", rows, expert, replica_id)
            return self._shard(key, rows, expert, replica_id, (half, halves))

        return shard

    def _shard(
        self, key: str, tensor: Tensor, expert: int, replica_id: tuple, rows_of: tuple[int, int] | None = None
    ) -> ShardedTensor:
        offsets = self.offsets
        if self.singleton:
            key = key.replace(self.prefix, f"{self.prefix}{expert}.", 1)
        else:
            offsets = (*offsets, (len(offsets), expert, self.total))
        axes = len(offsets)
        if rows_of is not None:
            offsets = (*offsets, (axes, *rows_of))
        return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=axes)
