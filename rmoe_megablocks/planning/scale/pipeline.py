"""How long a pipeline takes: every forward and backward pass of every micro-batch, in Megatron's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Work:
    """One pass of one micro-batch through one model chunk of a rank."""

    kind: str
    chunk: int
    microbatch: int


def order(pipeline: int, virtual: int, microbatches: int, rank: int) -> list[Work]:
    """What ``rank`` does, one after another (megatron/core/pipeline_parallel/schedules.py).

    1F1B: as many forward passes as ranks follow, then one forward, one backward, then the backward passes that are
    left. Interleaved: the same with chunks, p micro-batches of one chunk before the next chunk's.

    Raises:
        ValueError: chunks with micro-batches that p does not divide.
    """
    if virtual > 1 and microbatches % pipeline:
        raise ValueError(f"an interleaved schedule needs micro-batches ({microbatches}) in multiples of {pipeline}")
    total = microbatches * virtual
    if virtual == 1:
        warm_up = min(pipeline - rank - 1, total)
    else:
        warm_up = min(2 * (pipeline - rank - 1) + (virtual - 1) * pipeline, total)
    forward = [Work(FORWARD, *_place(i, pipeline, virtual)) for i in range(total)]
    backward = []
    for i in range(total):
        chunk, microbatch = _place(i, pipeline, virtual)
        backward.append(Work(BACKWARD, virtual - 1 - chunk, microbatch))
    result = forward[:warm_up]
    for i in range(total - warm_up):
        result += [forward[warm_up + i], backward[i]]
    return result + backward[total - warm_up :]


def _place(i: int, pipeline: int, virtual: int) -> tuple[int, int]:
    """Chunk and micro-batch of the i-th pass."""
    if virtual == 1:
        return 0, i
    group, inside = divmod(i, pipeline * virtual)
    return inside // pipeline, group * pipeline + inside % pipeline


def makespan(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], microbatches: int, message: float = 0.0
) -> float:
    """Time from the first pass to the end of the last.

    Args:
        forward: [pipeline][virtual] seconds of a forward pass of each rank's chunks.
        backward: the same of a backward pass.
        microbatches: of a step.
        message: seconds from the end of a pass to the moment the next stage has what it sent.
    """
    pipeline, virtual = len(forward), len(forward[0])
    last = pipeline * virtual - 1
    todo = [order(pipeline, virtual, microbatches, rank) for rank in range(pipeline)]
    at, position = [0.0] * pipeline, [0] * pipeline
    done: dict[tuple[str, int, int], float] = {}  # (kind, stage of the whole model, micro-batch): when
    left = sum(map(len, todo))
    while left:
        before = left
        for rank in range(pipeline):
            while position[rank] < len(todo[rank]):
                work = todo[rank][position[rank]]
                stage = work.chunk * pipeline + rank
                if work.kind == FORWARD:
                    needs = (FORWARD, stage - 1, work.microbatch) if stage else None
                else:  # the last stage's backward pass follows its own forward pass, without a message
                    needs = (BACKWARD, stage + 1, work.microbatch) if stage < last else None
                if needs is not None and needs not in done:
                    break
                start = at[rank] if needs is None else max(at[rank], done[needs] + message)
                times = forward if work.kind == FORWARD else backward
                at[rank] = start + times[rank][work.chunk]
                done[work.kind, stage, work.microbatch] = at[rank]
                position[rank] += 1
                left -= 1
        if left == before:
            raise RuntimeError("the schedule waits for itself")  # no order of Megatron's does
    return max(at)
