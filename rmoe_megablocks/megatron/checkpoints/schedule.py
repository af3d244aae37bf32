"""A run that resumes with another length, batch or learning rate: which schedule holds, and what is refused.

Megatron compares the schedule of the arguments with the checkpoint's at an assertion, on every rank. A run that is
only made longer or shorter follows the schedule of its new length; any other difference needs one of Megatron's two
options, which say whose schedule holds.
"""

import argparse

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rmoe_megablocks.compat.megatron import schedule as megatron_schedule
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import compatibility

OVERRIDE = "--override-opt_param-scheduler"
USE_CHECKPOINT = "--use-checkpoint-opt_param-scheduler"
_LENGTH = ("train_iters", "train_samples")
_ENDS = {"lr_decay_iters": "train_iters", "lr_decay_samples": "train_samples"}  # the end of the decay, if not given
_ARGUMENTS = (
    *("lr", "min_lr", "global_batch_size", "lr_decay_style", "lr_warmup_init"),
    *("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
_OF_THE_OPTIMIZER = {  # a loaded optimizer brings these along in its parameter groups, whatever the arguments say
    "adam": ("adam_beta1", "adam_beta2", "adam_eps"),
    "sgd": ("sgd_momentum",),
}


def choose(args: argparse.Namespace) -> list[str]:
    """Decides whose schedule a run that resumes follows. ``args`` are validated; returns lines for the user.

    Sets ``override_opt_param_scheduler`` where only the run's length differs, and with ``USE_CHECKPOINT`` the learning
    rates to the checkpoint's, by which Megatron recognises parameter groups.

    Raises:
        UsageError: another difference that neither option covers, or values that a loaded optimizer would ignore.
    """
    megatron_schedule.load_with({})  # not those of an earlier run in this process
    if args.load is None or args.finetune or args.skip_train:
        return []
    state = compatibility.saved_state(args.load, args.ckpt_step)
    if args.no_load_optim:
        return _starts_anew(args, state)
    saved = state and state.get("args")
    if saved is None or "opt_param_scheduler" not in state or getattr(saved, "no_save_optim", False):
        return []
    _check_optimizer(args, saved)
    theirs = saved_scheduler(saved, state["opt_param_scheduler"])
    ours = megatron_schedule.scheduler_of(args)
    if _values(ours) == _values(theirs) and not _changed(args, saved):
        return []
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        _check_only_longer(args, saved, ours, theirs)
        args.override_opt_param_scheduler = True
    if args.lr != saved.lr or args.min_lr != saved.min_lr:
        _carry_learning_rates(args, saved)
    return [_note(args, saved, state["iteration"], ours, theirs)]


def _starts_anew(args: argparse.Namespace, state: dict | None) -> list[str]:
    """Megatron loads the schedule's place with the optimizer or not at all (checkpointing.py:2604)."""
    ours = megatron_schedule.scheduler_of(args)
    here = "" if state is None else f", at {learning_rate(ours, 0):.4g} and not at {_at(ours, args, state):.4g}"
    return [f"--no-load-optim: the optimizer starts anew, and the learning rate's schedule with it{here}"]


def _at(scheduler: OptimizerParamScheduler, args: argparse.Namespace, state: dict) -> float:
    return learning_rate(scheduler, state["iteration"] * args.global_batch_size)


def saved_scheduler(saved: argparse.Namespace, state: dict) -> OptimizerParamScheduler:
    """The scheduler as a checkpoint left it: its values may be older than the arguments saved beside it."""
    scheduler = megatron_schedule.scheduler_of(saved)
    vars(scheduler).update({name: value for name, value in state.items() if name in vars(scheduler)})
    return scheduler


def _values(scheduler: OptimizerParamScheduler) -> dict:
    """What decides the curves; steps are samples."""
    left_out = ("optimizer", "num_steps", "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    return {name: value for name, value in vars(scheduler).items() if name not in left_out}


def _changed(args: argparse.Namespace, saved: argparse.Namespace) -> list[str]:
    """Arguments other than the length that differ and take part in the schedule."""
    changed = [name for name in _ARGUMENTS if getattr(args, name, None) != getattr(saved, name, None)]
    for name, length in _ENDS.items():  # Megatron sets the end to the length, so that a checkpoint always has both
        ours, theirs = _value(args, name), _value(saved, name)
        follows = getattr(args, name) in (None, getattr(args, length)) and theirs == getattr(saved, length)
        if ours != theirs and not follows:
            changed.append(name)
    return changed


def _check_optimizer(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Refuses what would be accepted and then be as in the checkpoint."""
    for name in ("optimizer", *_OF_THE_OPTIMIZER.get(args.optimizer, ())):
        ours, theirs = getattr(args, name), getattr(saved, name, None)
        if ours != theirs and theirs is not None:
            option = _option(name)
            raise UsageError(
                f"--load {args.load}: the checkpoint's optimizer has {option} {theirs}, this run has {option} {ours}: "
                f"use {option} {theirs}, or add --no-load-optim to start a new optimizer from the weights"
            )


def _check_only_longer(args, saved, ours: OptimizerParamScheduler, theirs: OptimizerParamScheduler) -> None:
    changed = _changed(args, saved)
    lengths = [name for name in _LENGTH if getattr(args, name) != getattr(saved, name)]
    if not changed and lengths:
        return
    if changed:
        pairs = ((_option(name), _value(saved, name), _value(args, name)) for name in changed)
        what = ", ".join(f"{option} {_said(there)}, this run has {_said(here)}" for option, there, here in pairs)
    else:  # it was last trained with USE_CHECKPOINT
        name = next(name for name, value in _values(ours).items() if value != _values(theirs)[name])
        what = f"a schedule of its own ({name} {getattr(theirs, name)}, these arguments make {getattr(ours, name)})"
    raise UsageError(
        f"--load {args.load}: the checkpoint was saved with {what}: use the checkpoint's value, or add {OVERRIDE} for "
        f"this run's schedule from here on, or {USE_CHECKPOINT} to keep the checkpoint's"
    )


def _carry_learning_rates(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    if args.use_checkpoint_opt_param_scheduler:
        args.lr, args.min_lr = saved.lr, saved.min_lr
        return
    if getattr(args, "use_mup", False):
        raise UsageError(
            f"--load {args.load}: the checkpoint was saved with --lr {saved.lr} --min-lr {saved.min_lr}, this run has "
            f"--lr {args.lr} --min-lr {args.min_lr}: with --use-mup they cannot change; add --no-load-optim"
        )
    megatron_schedule.load_with({"max_lr": (args.lr, saved.lr), "min_lr": (args.min_lr, saved.min_lr)})


def _note(args, saved, iteration: int, ours: OptimizerParamScheduler, theirs: OptimizerParamScheduler) -> str:
    """Which schedule holds, the learning rate before and after, and where it will end."""
    kept = args.use_checkpoint_opt_param_scheduler
    scheduler = theirs if kept else ours
    here = theirs.num_steps
    total = args.train_samples or here + max(0, args.train_iters - iteration) * args.global_batch_size
    before, now, last = (
        learning_rate(*at) for at in ((theirs, here), (scheduler, here), (scheduler, max(here, total)))
    )
    length = next(name for name in _LENGTH if getattr(args, name) is not None)
    whose = "the checkpoint's" if kept else f"that of {_option(length)} {getattr(args, length)}"
    was = f" (was {getattr(saved, length)})" if getattr(saved, length) != getattr(args, length) else ""
    instead = "" if kept or OVERRIDE in args.explicit else f"; add {USE_CHECKPOINT} to keep the checkpoint's"
    return (
        f"the {scheduler.lr_decay_style} schedule is {whose}{was}: learning rate {before:.4g} at iteration {iteration} "
        f"becomes {now:.4g}, and {last:.4g} at the end{instead}"
    )


def learning_rate(scheduler: OptimizerParamScheduler, steps: int) -> float:
    """Of parameters without overrides after ``steps`` samples."""
    kept, scheduler.num_steps = scheduler.num_steps, steps
    try:
        return scheduler.get_lr({})
    finally:
        scheduler.num_steps = kept


def _value(args: argparse.Namespace, name: str) -> object:
    value = getattr(args, name, None)
    return getattr(args, _ENDS[name]) if value is None and name in _ENDS else value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _said(value: object) -> str:
    return "none" if value is None else str(value)
