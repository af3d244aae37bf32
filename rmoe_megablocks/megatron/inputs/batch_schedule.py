"""Global batch sizes that are not one number for a whole run: what Megatron's own bookkeeping of them needs.

--step-batch-size-schedule leaves --global-batch-size at one micro-batch a rank, and a run of --train-iters counts its
data, its learning rate's schedule (get_optimizer_param_scheduler) and its evaluations by that. Counted in samples, as
--train-samples does, all of them are right: so such a run is turned into one of as many samples.
"""

import argparse

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from rmoe_megablocks.errors import UsageError

OPTION = "--step-batch-size-schedule"
#: Megatron's arguments in iterations, and those in samples that take their place
_IN_SAMPLES = {
    "lr_decay_iters": "lr_decay_samples",
    "lr_warmup_iters": "lr_warmup_samples",
    "lr_wsd_decay_iters": "lr_wsd_decay_samples",
}


def choose(args: argparse.Namespace) -> list[str]:
    """Completes parsed ``args``, not yet validated. Returns a line for each choice worth telling.

    Raises:
        UsageError: a schedule that would end the training when it gets there.
    """
    if args.step_batch_size_schedule is None:
        return _choose_decreased(args)
    schedule = _Schedule(args)
    if args.eval_global_batch_size is None:
        args.eval_global_batch_size = schedule.steps[0][1]
    if not args.train_iters:
        return []
    iterations = args.train_iters
    args.train_samples, args.train_iters = schedule.samples(iterations), None
    for name, in_samples in _IN_SAMPLES.items():
        if getattr(args, name):
            setattr(args, in_samples, schedule.samples(getattr(args, name)))
            setattr(args, name, 0 if name == "lr_warmup_iters" else None)
    return [
        f"{OPTION}: --train-iters {iterations} are --train-samples {args.train_samples}; "
        "the learning rate follows samples, not iterations"
    ]


def _choose_decreased(args: argparse.Namespace) -> list[str]:
    """--decrease-batch-size-if-needed: what fits is known here, and evaluation must not ask for more."""
    if not (args.decrease_batch_size_if_needed and args.global_batch_size and args.micro_batch_size):
        return []
    unit = args.micro_batch_size * _data_parallel_size(args)
    fitting = args.global_batch_size // unit * unit
    if fitting == args.global_batch_size:
        return []
    if not fitting:
        raise UsageError(
            f"--global-batch-size {args.global_batch_size} is below one micro-batch on each rank ({unit} samples): "
            "raise it, or lower --micro-batch-size or the number of processes"
        )
    if args.eval_global_batch_size is None:
        args.eval_global_batch_size = fitting
    return [
        f"--decrease-batch-size-if-needed: an iteration takes {fitting} samples, not --global-batch-size "
        f"{args.global_batch_size}; the learning rate's schedule is for the latter"
    ]


def _data_parallel_size(args: argparse.Namespace) -> int:
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return args.world_size // model


class _Schedule:
    """Megatron's own reading of --step-batch-size-schedule.

    Attributes:
        steps: (samples trained before, global batch size from there on), ascending.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        text, unit = args.step_batch_size_schedule, (args.micro_batch_size or 1) * _data_parallel_size(args)
        try:
            calculator = StepBatchsizeNumMicroBatchesCalculator(
                args.micro_batch_size or 1, _data_parallel_size(args), False, -1, text, args.seq_length
            )
        except (ValueError, AssertionError) as error:
            raise UsageError(f'{OPTION} "{text}": {error}; it reads as "0:8 100K:16", tokens:samples') from error
        self.steps: list[tuple[int, int]] = calculator.schedule
        before = 0
        for _, size in self.steps:
            if size % unit:
                raise UsageError(
                    f'{OPTION} "{text}": {size} is no multiple of {unit} (--micro-batch-size {args.micro_batch_size} '
                    f"on each of {_data_parallel_size(args)} data-parallel ranks)"
                )
            if size < before:
                raise UsageError(f'{OPTION} "{text}": batches shrink from {before} to {size}, which Megatron refuses')
            before = size

    def samples(self, iterations: int) -> int:
        """Of so many iterations from the beginning."""
        samples = 0
        for (_, size), (end, _) in zip(self.steps, [*self.steps[1:], (None, 0)], strict=True):
            taken = iterations if end is None else min(iterations, max(0, -(-(end - samples) // size)))
            samples += taken * size
            iterations -= taken
        return samples
