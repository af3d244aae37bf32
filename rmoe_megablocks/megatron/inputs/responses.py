"""Megatron's GPT dataset whose loss mask leaves out prompts, for splits that have a mask beside their tokens."""

import argparse
import copy
from pathlib import Path

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training.utils import get_blend_and_blend_per_split

from rmoe_megablocks.data.prepared.responses import Masks, mask_path
from rmoe_megablocks.errors import UsageError


class ResponseDataset(GPTDataset):
    """A GPTDataset; where its split has a mask, a label of a prompt has the loss mask 0.

    The mask is read through the indices that tokens are read through (``_query_document_sample_shuffle_indices``,
    gpt_dataset.py), so that it lies as they do in any packing, order and epoch.
    """

    def __init__(self, dataset, dataset_path, *args, **kwargs) -> None:
        super().__init__(dataset, dataset_path, *args, **kwargs)
        self._of_masks = None
        if has_mask(dataset_path):
            self._of_masks = copy.copy(self)
            self._of_masks.dataset = Masks(dataset_path)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """A sample [S] of Megatron's, ``loss_mask`` float32."""
        sample = super().__getitem__(idx)
        if self._of_masks is None:
            return sample
        mask, *_ = self._of_masks._query_document_sample_shuffle_indices(0 if idx is None else idx)
        counts_S = torch.from_numpy(mask == 1)[1:]  # of the labels, which are a token further; padding is no label
        return sample | {"loss_mask": sample["loss_mask"] * counts_S}


def has_mask(prefix: str | Path | None) -> bool:
    """Whether the split PREFIX has a mask beside its tokens."""
    return prefix is not None and mask_path(prefix).is_file()


def masked(args: argparse.Namespace) -> list[str]:
    """The prefixes that have a mask, of those that a run reads."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    prefixes = [prefix for part in (blend, *(blend_per_split or ())) if part for prefix in part[0]]
    return [prefix for prefix in prefixes if has_mask(prefix)]


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for what Megatron computes as if no token were left out of the loss."""
    found = masked(args)
    if not found:
        return
    where = f"{mask_path(found[0])}, which leaves prompts out of the loss"
    if args.calculate_per_token_loss:
        raise UsageError(
            f"--calculate-per-token-loss does not work with {where}: the balancing losses, which count all tokens, "
            "would be divided by the others' number alone; leave it out"
        )
    if args.context_parallel_size > 1 and args.mtp_num_layers:
        raise UsageError(
            f"--mtp-num-layers with --context-parallel-size {args.context_parallel_size} does not work with {where}: "
            "each rank would divide its loss by its own part's tokens; leave one of them out"
        )
