"""Exact loss of a whole split, or of its first tokens: every token once, none left out, none drawn twice."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config
from megatron.training import get_args, training

from rmoe_megablocks.megatron.inputs import batches
from rmoe_megablocks.megatron.monitoring import routing_stream
from rmoe_megablocks.megatron.monitoring.interruption import Interrupted

SECONDS_BETWEEN_CHECKS = 1.0
_MICRO_BATCHES_A_STAGE = 4  # keeps a pipeline's stages at work, and a step short enough to be stopped


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a split that is evaluated.

    Attributes:
        tokens: [T], the first of which is predicted by nothing.
        of: tokens of the split that something predicts; ``predicted`` of them are in this part.
        bytes_per_token: of the whole split's text.
    """

    tokens: np.ndarray
    of: int
    bytes_per_token: float

    @classmethod
    def first(cls, tokens: np.ndarray, split_bytes: int, cap: int | None) -> "Part":
        """The part with at most ``cap`` predicted tokens, from the split's beginning."""
        of = len(tokens) - 1
        return cls(tokens[: min(of, cap or of) + 1], of, split_bytes / len(tokens))

    @property
    def predicted(self) -> int:
        return len(self.tokens) - 1

    @property
    def partial(self) -> bool:
        return self.predicted < self.of

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The measure that enwik8 results call BPC; a part has the bytes of its share of the split's tokens."""
        return nats_per_token / math.log(2) / self.bytes_per_token


def mean_loss(
    model: list[torch.nn.Module],
    tokens: np.ndarray,
    check: Callable[[float], float] = lambda seconds: seconds,
    advance: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean nats of a token, from windows of --seq-length tokens, each predicted from its own window alone.

    Every token but the first is predicted once. Collective: all ranks call it, all get the result.

    Args:
        tokens: [T], T >= 2.
        check: called about once a second with the seconds that a step takes; gives those that all ranks agree on, or
            raises Interrupted on all of them.
        advance: called with the number of tokens predicted since it was called last.

    Raises:
        Interrupted: by ``check``, or by --exit-duration-in-mins; with the mean over the tokens predicted until then.
        ValueError: nothing to predict.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens: nothing to predict")
    args = get_args()
    with (
        routing_stream.recorded(model, args),
        _steps_of(_micro_batches_a_step(model, args), args) as windows_a_step,
    ):
        tokens_a_step = windows_a_step * args.seq_length
        steps = math.ceil((len(tokens) - 1) / tokens_a_step)
        windows = [_micro_batches(tokens, args, steps * windows_a_step) for _ in model]
        nats, done, seconds = 0.0, 0, 0.0
        try:
            while done < steps:
                seconds = check(seconds)
                chunk = min(steps - done, max(1, int(SECONDS_BETWEEN_CHECKS / seconds)) if seconds else 1)
                started = time.perf_counter()
                losses, _, late = training.evaluate(
                    batches.forward_step,
                    windows if len(model) > 1 else windows[0],
                    model,
                    None,
                    get_model_config(model[0]),
                    eval_iters=chunk,
                )
                if late:  # on all ranks
                    raise Interrupted(f"by --exit-duration-in-mins {args.exit_duration_in_mins}")
                seconds = (time.perf_counter() - started) / chunk
                predicted = min((done + chunk) * tokens_a_step, len(tokens) - 1) - done * tokens_a_step
                done += chunk
                if losses:
                    nats += float(losses["lm loss"]) * predicted  # float64: Megatron's own sums are float32
                advance(predicted)
        except Interrupted as interrupted:
            if done:  # on all ranks alike
                interrupted.done = done * tokens_a_step
                interrupted.mean = _last_stages(nats) / interrupted.done
            raise
    return _last_stages(nats) / (len(tokens) - 1)


def _last_stages(nats: float) -> float:
    """The sum that the last stage has. Collective."""
    total = torch.tensor([nats], dtype=torch.float64, device="cuda")
    torch.distributed.broadcast(total, torch.distributed.get_world_size() - 1)
    return total.item()


def _micro_batches_a_step(model: list[torch.nn.Module], args) -> int:
    """For each data-parallel rank: Megatron's number for evaluation, or less where a step would be long.

    An interleaved schedule takes multiples of its group of stages.
    """
    asked = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    group = get_model_config(model[0]).microbatch_group_size_per_vp_stage if len(model) > 1 else 0
    return min(asked, _MICRO_BATCHES_A_STAGE * max(args.pipeline_model_parallel_size, group or 0))


@contextlib.contextmanager
def _steps_of(micro_batches: int, args) -> Iterator[int]:
    """Has training.evaluate take so many micro-batches a rank in a step. Gives the windows of a step."""
    saved = args.eval_global_batch_size
    args.eval_global_batch_size = micro_batches * args.eval_micro_batch_size * args.data_parallel_size
    try:
        yield args.eval_global_batch_size
    finally:
        args.eval_global_batch_size = saved


def _micro_batches(tokens: np.ndarray, args, windows: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches; windows beyond the text are padding with a zero loss mask."""
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    seq_length, rows = args.seq_length, args.eval_micro_batch_size
    position_ids = torch.arange(seq_length).expand(rows, -1).contiguous()
    for first in range(rank * rows, windows, ranks * rows):
        text = np.zeros((rows, seq_length + 1), dtype=np.int64)
        mask = np.zeros((rows, seq_length), dtype=np.float32)
        for row in range(rows):
            piece = tokens[(first + row) * seq_length : (first + row + 1) * seq_length + 1]
            text[row, : len(piece)] = piece
            mask[row, : max(0, len(piece) - 1)] = 1.0
        text = torch.from_numpy(text)
        batch = {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": position_ids,
        }
        if args.create_attention_mask_in_dataloader:  # as GPTDataset makes it: True hides
            hidden = torch.ones(seq_length, seq_length, dtype=torch.bool).triu(1)
            batch["attention_mask"] = hidden.expand(rows, 1, -1, -1).contiguous()
        yield batch
