"""Attention over a sequence that is split over the ranks of a context-parallel group.

Upstream leaves context parallelism to Transformer Engine (dot_product_attention.py:57), which needs a GPU. Here the
keys and values of the whole sequence are gathered and everything else is upstream's: projections, rotary embeddings,
grouped queries, softmax, recomputation. It saves no memory in attention and is meant to prove what happens around it.
"""

from __future__ import annotations

import copy
import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import get_default_causal_mask, get_sliding_window_causal_mask
from torch import Tensor


@functools.cache
def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """The two of ``2 * ranks`` chunks of a sequence that a rank holds: causal work is even so (core/utils.py:2508)."""
    return rank, 2 * ranks - 1 - rank


def in_global_order(gathered_SBND: Tensor, ranks: int) -> Tensor:
    """Sorts what ranks hold, one rank after another along the first dimension, by position in the sequence."""
    held = torch.tensor([chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks)])
    chunks = gathered_SBND.unflatten(0, (2 * ranks, -1))
    return chunks.index_select(0, held.argsort().to(chunks.device)).flatten(0, 1)


class ContextParallelAttention(DotProductAttention):
    """Upstream's attention of a rank's queries [S / ranks, B, N, D] to the keys and values of the whole sequence.

    With a context-parallel size of 1 it is upstream's attention.
    """

    def __init__(self, config, *args, **kwargs) -> None:
        undivided = copy.copy(config)
        undivided.context_parallel_size = 1  # the one thing that the assertion looks at
        super().__init__(undivided, *args, **kwargs)
        self.config = config

    def forward(self, query, key, value, attention_mask, *args, **kwargs):
        """As upstream. A given mask has this rank's rows and the columns of the whole sequence, True: not seen."""
        if self.config.context_parallel_size == 1:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        ranks = self.pg_collection.cp.size()
        key, value = (in_global_order(self._gather(tensor), ranks) for tensor in (key, value))
        softmax = self.scale_mask_softmax
        window, softmax.window_size = softmax.window_size, None  # it would count positions from this rank's first
        try:
            if attention_mask is None or window is not None:
                attention_mask = self._causal_rows(key.size(0), window)
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        finally:
            softmax.window_size = window

    def _gather(self, tensor: Tensor) -> Tensor:
        """All ranks' parts one after another. Backward sums over the ranks, whose queries all used every key."""
        return tensor_parallel.gather_from_sequence_parallel_region(tensor, group=self.pg_collection.cp)

    def _causal_rows(self, length: int, window: tuple[int, int] | None) -> Tensor:
        """Rows of the whole sequence's mask [length, length] that belong to this rank's queries."""
        group = self.pg_collection.cp
        mask = (
            get_sliding_window_causal_mask(length, length, window) if window else get_default_causal_mask(length)
        ).unflatten(0, (2 * group.size(), -1))
        return mask[list(chunks_of(group.rank(), group.size()))].flatten(0, 1)
