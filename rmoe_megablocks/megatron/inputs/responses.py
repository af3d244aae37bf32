"""Megatron's GPT dataset whose loss mask leaves out prompts, for splits that have a mask beside their tokens."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from rmoe_megablocks.data.prepared.responses import Masks, mask_path

#: prefixes and their weights
Blend = tuple[list[str], list[float] | None] | None


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


def masked(blend: Blend, blend_per_split: Sequence[Blend] | None) -> list[str]:
    """The prefixes that have a mask, of what ``get_blend_and_blend_per_split`` makes of a run's arguments."""
    prefixes = [prefix for part in (blend, *(blend_per_split or ())) if part for prefix in part[0]]
    return [prefix for prefix in prefixes if has_mask(prefix)]
