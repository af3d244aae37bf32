"""Megatron's learning rates: its scheduler without a model, and a load that survives another learning rate."""

import argparse
import copy
import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from rmoe_megablocks.process import quiet_logging


def scheduler_of(args: argparse.Namespace) -> OptimizerParamScheduler:
    """The scheduler that Megatron would build for validated ``args``, over no parameters.

    training.py:1908 takes its arguments from the global ones, which do not exist yet, and completes them: a copy.
    """
    own, original = copy.copy(args), training.get_args
    training.get_args = lambda: own
    try:
        with quiet_logging():  # the run says its style itself
            return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:
        training.get_args = original


def load_with(learning_rates: dict[str, tuple[float, float]]) -> None:
    """Has the next load accept a checkpoint of other learning rates, and the run keep its own.

    An optimizer's parameter groups carry max_lr and min_lr, by which Megatron tells which group of the checkpoint is
    which (optimizer.py:139): another one ends in a ValueError, even with --override-opt_param-scheduler, and the groups
    would bring the old ones along. training.py:2199 looks ``load_checkpoint`` up when called.

    Args:
        learning_rates: {"max_lr": (this run's, the checkpoint's), "min_lr": ...}; empty changes nothing.
    """
    original = getattr(training.load_checkpoint, "before_learning_rates", training.load_checkpoint)

    @functools.wraps(original)
    def load_checkpoint(model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        replace(optimizer.param_groups, learning_rates)
        loaded = original(model, optimizer, opt_param_scheduler, *args, **kwargs)
        replace(optimizer.param_groups, {name: (old, new) for name, (new, old) in learning_rates.items()})
        opt_param_scheduler.step(0)
        return loaded

    load_checkpoint.before_learning_rates = original
    training.load_checkpoint = load_checkpoint if learning_rates else original


def replace(groups: Iterable[dict], values: dict[str, tuple[float, float]]) -> None:
    """Replaces in parameter groups the first of each pair by the second; --decoupled-lr has groups of its own."""
    for group in groups:
        for name, (old, new) in values.items():
            if group.get(name) == old:
                group[name] = new
