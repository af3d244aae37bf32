"""Bytes that one rank sends in a training step, on the rank that sends most."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe_megablocks.planning.counts import memory, parameters
from rmoe_megablocks.planning.settings import Settings


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a rank in a step.

    Attributes:
        pipeline: hidden states to the next stage and their gradients to the previous one, with the routing state.
        pipeline_state: of that, the routing state.
        all_to_all: tokens to experts on other ranks and back, forward and backward; what stays on the rank left out.
        data_parallel: gradients and, with the distributed optimizer, weights (ring algorithms).
    """

    pipeline: int
    pipeline_state: int
    all_to_all: int
    data_parallel: int


def traffic(settings: Settings, world_size: int) -> Traffic:
    """Traffic of the busiest rank, for each kind."""
    steps = memory.microbatches(settings, world_size)
    share = settings.tensor if settings.sequence_parallel else 1
    tokens = memory.tokens_on_rank(settings) / share
    messages = steps * max(_messages(settings, rank) for rank in range(settings.pipeline))
    # the state travels in its own dtype's bits, or widened to the pipeline's (megatron/recurrence/stage_boundary.py)
    state_size = settings.routing.state_size if settings.routing else 0
    wire = max(settings.router_dtype_bytes, settings.dtype_bytes) * state_size
    state = messages * tokens * wire
    return Traffic(
        pipeline=int(messages * tokens * settings.hidden_size * settings.dtype_bytes + state),
        pipeline_state=int(state),
        all_to_all=int(steps * _all_to_all(settings, tokens)),
        data_parallel=max(_data_parallel(settings, world_size, rank) for rank in range(settings.pipeline)),
    )


def _messages(settings: Settings, rank: int) -> int:
    """Messages that a pipeline rank sends for one micro-batch: forward and backward over each boundary it has."""
    if settings.pipeline == 1:
        return 0
    chunks = settings.virtual
    forward = chunks - (rank == settings.pipeline - 1)
    backward = chunks - (rank == 0)
    return forward + backward


def _all_to_all(settings: Settings, tokens: float) -> float:
    if settings.expert == 1:
        return 0.0
    layers = max(
        sum(settings.moe_layers[index] for index in parameters.layers_of_rank(settings, rank))
        for rank in range(settings.pipeline)
    )
    leaving = tokens * settings.expected_experts * (settings.expert - 1) / settings.expert
    recomputed = settings.recompute == "full" or "moe" in settings.recompute_modules
    passes = 3 if recomputed else 2  # forward, backward, and forward again
    # there with the token's weight for the expert, and back
    return passes * layers * leaving * (2 * settings.hidden_size * settings.dtype_bytes + settings.router_dtype_bytes)


def _data_parallel(settings: Settings, world_size: int, rank: int) -> int:
    counts = parameters.stage(settings, rank)
    dense_ranks = max(1, world_size // (settings.tensor * settings.pipeline))
    expert_ranks = max(1, world_size // (settings.expert * settings.expert_tensor * settings.pipeline))
    # an all-reduce is a reduce-scatter and an all-gather of gradients; the distributed optimizer gathers weights
    gathered = settings.dtype_bytes if settings.distributed_optimizer else settings.grad_bytes
    # neither is done for frozen weights
    sent = (counts.dense_on_rank(settings) - counts.frozen) * (dense_ranks - 1) / dense_ranks
    sent += counts.experts_on_rank(settings) * (expert_ranks - 1) / expert_ranks
    return int(sent * (settings.grad_bytes + gathered))
