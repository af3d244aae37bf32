"""Exact loss of a whole split: every token once, none left out, none drawn twice."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config
from megatron.training import get_args, training

from rmoe_megablocks import data
from rmoe_megablocks.megatron import batches


def bits_per_byte(model: list[torch.nn.Module], prefix: Path, split_bytes: int) -> float:
    """Bits per byte of the text behind a prepared split, the measure that enwik8 results call BPC.

    The split is cut into windows of --seq-length tokens, each predicted from its own window alone; every token but
    the first of the split is predicted once. Collective: all ranks call it, all get the result.
    """
    tokens = data.read_tokens(prefix)
    nats_per_token = _mean_loss(model, tokens)
    bits = nats_per_token * len(tokens) / math.log(2)
    return bits / split_bytes


def _mean_loss(model: list[torch.nn.Module], tokens: np.ndarray) -> float:
    args = get_args()
    windows = math.ceil((len(tokens) - 1) / args.seq_length)
    iterations = math.ceil(windows / args.eval_global_batch_size)

    def iterator() -> Iterator[dict[str, torch.Tensor]]:
        return _micro_batches(
            tokens, args.seq_length, args.eval_micro_batch_size, iterations * args.eval_global_batch_size
        )

    with _evaluation_micro_batch(args):
        losses, _, _ = training.evaluate(
            batches.forward_step,
            [iterator() for _ in model] if len(model) > 1 else iterator(),
            model,
            None,
            get_model_config(model[0]),
            eval_iters=iterations,
        )
    mean = torch.tensor([float(losses["lm loss"]) if losses else 0.0], dtype=torch.float64, device="cuda")
    torch.distributed.broadcast(mean, torch.distributed.get_world_size() - 1)  # the last stage has it
    return mean.item()


class _evaluation_micro_batch:
    """get_batch sizes its broadcasts by args.micro_batch_size."""

    def __init__(self, args) -> None:
        self.args = args

    def __enter__(self) -> None:
        self.saved, self.args.micro_batch_size = self.args.micro_batch_size, self.args.eval_micro_batch_size

    def __exit__(self, *error) -> None:
        self.args.micro_batch_size = self.saved


def _micro_batches(tokens: np.ndarray, seq_length: int, micro_batch_size: int, windows: int):
    """This data-parallel rank's micro-batches; windows beyond the text are padding with a zero loss mask."""
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    position_ids = torch.arange(seq_length).expand(micro_batch_size, -1)
    for first in range(rank * micro_batch_size, windows, ranks * micro_batch_size):
        text = np.zeros((micro_batch_size, seq_length + 1), dtype=np.int64)
        mask = np.zeros((micro_batch_size, seq_length), dtype=np.float32)
        for row in range(micro_batch_size):
            piece = tokens[(first + row) * seq_length : (first + row + 1) * seq_length + 1]
            text[row, : len(piece)] = piece
            mask[row, : max(0, len(piece) - 1)] = 1.0
        text = torch.from_numpy(text)
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": position_ids.contiguous(),
        }
