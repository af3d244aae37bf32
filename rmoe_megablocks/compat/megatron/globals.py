"""Megatron's global variables, lent to code that runs before or beside a run."""

import argparse
import contextlib
from collections.abc import Iterator
from types import ModuleType

from megatron.core import num_microbatches_calculator, parallel_state
from megatron.training import global_vars

# What builders look up instead of taking it as an argument: arguments and tokenizer (training.py:1908,
# batches.dataset_config), the calculator (training.py:1539), the pipeline rank (transformer_block.py:119)
_VARIABLES: tuple[tuple[ModuleType, str], ...] = (
    (global_vars, "_GLOBAL_ARGS"),
    (global_vars, "_GLOBAL_TOKENIZER"),
    (num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"),
    (parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK"),
    (parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"),
)


@contextlib.contextmanager
def lent(args: argparse.Namespace) -> Iterator[None]:
    """Within it Megatron's arguments are ``args``, and nothing else is set yet; afterwards all is as before."""
    saved = [(module, name, getattr(module, name)) for module, name in _VARIABLES]
    for module, name in _VARIABLES:
        setattr(module, name, None)
    global_vars.set_args(args)
    parallel_state.set_pipeline_model_parallel_world_size(args.pipeline_model_parallel_size)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def set_tokenizer(tokenizer: object) -> None:
    """Makes ``tokenizer`` the one that get_tokenizer answers, which Megatron does while it builds it from arguments."""
    global_vars._GLOBAL_TOKENIZER = tokenizer


def batch_size_schedule() -> list[tuple[int, int]]:
    """(first sample, batch size) of every step of --step-batch-size-schedule; empty without one. It has no getter."""
    return getattr(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR, "schedule", [])
