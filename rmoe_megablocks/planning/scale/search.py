"""The fastest layout of a model on so many ranks, within their memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rmoe_megablocks.planning.counts import memory
from rmoe_megablocks.planning.plan import divisions
from rmoe_megablocks.planning.scale.cost import StepTime, step_time
from rmoe_megablocks.planning.scale.hardware import Hardware
from rmoe_megablocks.planning.settings import Settings

_DEEPEST, _VIRTUAL, _MICRO_BATCHES = 32, (1, 2, 4), (1, 2, 4, 8)


@dataclass(frozen=True)
class Found:
    """The best layout for one number of nodes.

    Attributes:
        nodes: of the machine.
        world_size: GPUs.
        settings: with layout, micro-batch, recompute mode and batch.
        time: of a step.
        memory: bytes of the fullest rank.
    """

    nodes: int
    world_size: int
    settings: Settings
    time: StepTime
    memory: int

    @property
    def layout(self) -> str:
        """As ``PP2 EP4 DP8, micro-batch 2, recompute core_attn``."""
        s = self.settings
        data = self.world_size // (s.tensor * s.pipeline * s.context)
        sizes = {"TP": s.tensor, "PP": s.pipeline, "VPP": s.virtual, "CP": s.context, "EP": s.expert, "DP": data}
        words = [" ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"]
        words.append(f"micro-batch {s.micro_batch_size}")
        if s.recompute != "none":
            words.append("recompute " + (" ".join(s.recompute_modules) or "full"))
        return ", ".join(words)


def best(settings: Settings, nodes: int, machine: Hardware) -> Found | None:
    """The fastest layout of those that fit; None where none does.

    The batch is the configuration's; where no layout divides it, the next larger one that some layout does.
    """
    world = nodes * machine.gpus
    candidates = list(_candidates(settings, world, machine))
    if found := _fastest(candidates, nodes, world, machine):
        return found
    larger = [_with_larger_batch(candidate, world) for candidate in candidates]
    for batch in sorted({candidate.global_batch_size for candidate in larger}):
        if found := _fastest([c for c in larger if c.global_batch_size == batch], nodes, world, machine):
            return found
    return None


def _fastest(candidates: list[Settings], nodes: int, world: int, machine: Hardware) -> Found | None:
    found = None
    for candidate in candidates:
        if divisions(candidate, world):
            continue
        # recompute modes go from the cheapest to the dearest: the first that fits is the fastest
        for mode in memory.RECOMPUTE_MODES:
            varied = memory.with_recompute(candidate, mode)
            total = memory.fullest(varied, world).total
            if total <= memory.usable(machine.memory):
                time = step_time(varied, world, machine)
                if found is None or time.total < found.time.total:
                    found = Found(nodes, world, varied, time, total)
                break
    return found


def _with_larger_batch(s: Settings, world: int) -> Settings:
    """With the configured number of sequences rounded up to what the layout takes."""
    least = s.micro_batch_size * max(1, world // (s.tensor * s.pipeline)) * (s.pipeline if s.virtual > 1 else 1)
    return replace(s, global_batch_size=-(-s.global_batch_size // least) * least)


def _candidates(s: Settings, world: int, machine: Hardware) -> Iterator[Settings]:
    tensors = [n for n in _divisors(s.heads) if n <= machine.gpus and (n == 1 or s.query_groups % n == 0)]
    stages = [n for n in _divisors(s.num_layers) if n <= _DEEPEST]
    experts = _divisors(s.num_experts) if s.num_experts else [1]
    for tensor, pipeline, virtual, expert, micro in itertools.product(
        tensors, stages, _VIRTUAL, experts, _MICRO_BATCHES
    ):
        if (virtual > 1 and pipeline == 1) or world % (tensor * pipeline):
            continue
        yield replace(
            s,
            tensor=tensor,
            pipeline=pipeline,
            virtual=virtual,
            context=1,
            expert=expert,
            expert_tensor=1,
            sequence_parallel=tensor > 1,
            distributed_optimizer=True,
            micro_batch_size=micro,
        )


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def node_counts(text: str) -> list[int]:
    """``1:1250`` is 1, 2, 4, ... 1024, 1250; ``4`` and ``1,3,8`` are those. Raises ValueError."""
    if ":" in text:
        first, last = (int(part) for part in text.split(":"))
        if not 1 <= first <= last:
            raise ValueError(text)
        powers = [first * 2**i for i in range(64) if first * 2**i < last]
        return [*powers, last]
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers
