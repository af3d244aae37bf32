"""Batches that change: Megatron's bookkeeping counts them in samples, and what would end the training is refused."""

import argparse

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.inputs import batch_schedule


def arguments(**changed) -> argparse.Namespace:
    values = {
        "step_batch_size_schedule": None,
        "decrease_batch_size_if_needed": False,
        "global_batch_size": None,
        "micro_batch_size": 2,
        "eval_global_batch_size": None,
        "seq_length": 64,
        "train_iters": 12,
        "train_samples": None,
        "world_size": 4,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 1,
    }
    for iterations, samples in batch_schedule._IN_SAMPLES.items():
        values |= {iterations: None, samples: None}
    return argparse.Namespace(**(values | {"lr_warmup_iters": 0, "lr_warmup_samples": 0} | changed))


@pytest.mark.parametrize("schedule", ["0:4,1K:8", "0:4", "0:4 640:8 704:12 10K:16", "0:4 64:8 128:12 192:16"])
@pytest.mark.parametrize("iterations", [1, 4, 5, 12, 40])
def test_iterations_are_the_samples_that_megatron_takes_in_them(schedule, iterations):
    args = arguments(step_batch_size_schedule=schedule, train_iters=iterations, lr_warmup_iters=2, lr_decay_iters=3)
    (note,) = batch_schedule.choose(args)
    calculator = StepBatchsizeNumMicroBatchesCalculator(2, 2, False, -1, schedule, 64)
    consumed = [0]
    for _ in range(max(iterations, 3)):
        calculator.update(consumed[-1], True)
        consumed.append(consumed[-1] + calculator.get_current_global_batch_size())
    assert (args.train_iters, args.train_samples) == (None, consumed[iterations])
    assert (args.lr_warmup_iters, args.lr_warmup_samples) == (0, consumed[2])
    assert (args.lr_decay_iters, args.lr_decay_samples) == (None, consumed[3])
    assert args.eval_global_batch_size == 4
    assert f"--train-iters {iterations} are --train-samples {consumed[iterations]}" in note


def test_samples_stay_samples():
    args = arguments(step_batch_size_schedule="0:4 1K:8", train_iters=None, train_samples=100)
    assert batch_schedule.choose(args) == []
    assert (args.train_iters, args.train_samples) == (None, 100)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("0:8 1K:4", "shrink from 8 to 4"),
        ("0:4 1K:6", "6 is no multiple of 4"),
        ("8", "Invalid schedule entry"),
        ("128:8", "must have threshold 0"),
        ("1K:8", "must have threshold 0"),
        ("0:x", "could not convert"),
        ("", "at least one entry"),
    ],
)
def test_a_schedule_that_would_end_the_training_is_refused(schedule, said):
    with pytest.raises(UsageError, match=f"--step-batch-size-schedule.*({said})"):
        batch_schedule.choose(arguments(step_batch_size_schedule=schedule))


def test_a_decreased_batch_is_told_and_evaluation_takes_no_more():
    args = arguments(decrease_batch_size_if_needed=True, global_batch_size=10)
    (note,) = batch_schedule.choose(args)
    assert "takes 8 samples, not --global-batch-size 10" in note
    assert args.eval_global_batch_size == 8
    with pytest.raises(UsageError, match="--global-batch-size 3 is below one micro-batch on each rank"):
        batch_schedule.choose(arguments(decrease_batch_size_if_needed=True, global_batch_size=3))
    args = arguments(global_batch_size=8)
    assert batch_schedule.choose(args) == [] and args.eval_global_batch_size is None
