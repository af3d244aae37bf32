"""The CPU generator in the place of the CUDA one.

Megatron keeps two kinds of random state: that of the CUDA generator (initial weights, dropout), which its tracker
switches between parallel regions and restores for recomputation, and that of the CPU generator (everything else).
On the CPU dropout draws from the CPU generator, so that one plays the part of the CUDA generator here. Whatever would
have drawn from the CPU generator beside it must then be kept from disturbing it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.cuda.random
import torch.utils.data.dataloader as dataloader

_TRACKER_LOGGER = "megatron.core.tensor_parallel.random"
_TRACKER_WARNING = "CPU RNG state changed within GPU RNG context"


class _Generators:
    """``torch.cuda.default_generators``: the same generator for whatever index (random.py:129, 166)."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return torch.cuda.device_count()


def _get_state(device: Any = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _install_generator() -> None:
    replacements = {
        "default_generators": _Generators(),
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "get_rng_state_all": lambda: [_get_state()],
        "set_rng_state_all": lambda states: _set_state(next(iter(states))),
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "seed": lambda: torch.default_generator.seed(),
        "seed_all": lambda: torch.default_generator.seed(),
        "initial_seed": lambda: torch.default_generator.initial_seed(),
    }
    # Megatron reaches the functions through both modules (random.py:118, 305, 490).
    for module in (torch.cuda, torch.cuda.random):
        for name, replacement in replacements.items():
            setattr(module, name, replacement)


def _quiet_tracker() -> None:
    # The tracker warns in fork() when the CPU state changes while the CUDA state is forked (random.py:333). Here they
    # are one, so it would warn about every fork.
    logging.getLogger(_TRACKER_LOGGER).addFilter(lambda record: _TRACKER_WARNING not in record.getMessage())


def _shield_from_data_loaders() -> None:
    # Starting a DataLoader draws a seed for its workers from the CPU generator. Only some ranks have a DataLoader
    # (the first of each tensor-parallel group), and a resumed run starts one where an uninterrupted one does not: in
    # both cases dropout would differ where it has to be equal.
    original = dataloader._BaseDataLoaderIter.__init__

    def __init__(self, loader):
        state = torch.default_generator.get_state()
        try:
            original(self, loader)
        finally:
            torch.default_generator.set_state(state)

    dataloader._BaseDataLoaderIter.__init__ = __init__


def install() -> None:
    """Apply everything above."""
    _install_generator()
    _quiet_tracker()
    _shield_from_data_loaders()
