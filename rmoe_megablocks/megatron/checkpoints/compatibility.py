"""What a checkpoint says of the model that wrote it, read before anything is built."""

import argparse
import dataclasses
import functools
import warnings
from pathlib import Path

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training.checkpointing import get_checkpoint_tracker_filename

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import safety
from rmoe_megablocks.megatron.experts.backend import MEGATRON
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.process import quiet_logging
from rmoe_megablocks.routing import get_router_type
from rmoe_megablocks.torch_dist.reading import COMMON_STATE, Reader
from rmoe_megablocks.torch_dist.unpickling import INDEX, UnsafePickle


def latest_iteration(folder: Path | str | None) -> int | None:
    """Iteration that Megatron's tracker file in ``folder`` names, None where there is no checkpoint."""
    if folder is None:
        return None
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text == "release":
        return 0
    if not text.isdigit():
        raise UsageError(f"--load {folder}: {tracker.name} should name an iteration but says {text[:40]!r}")
    return int(text)


def saved_arguments(folder: Path | str, step: int | None = None) -> argparse.Namespace | None:
    """Arguments of the run that wrote a torch_dist checkpoint, as :func:`saved_state`; None for other formats."""
    state = saved_state(folder, step)
    return state and state.get("args")


def saved_state(folder: Path | str, step: int | None = None) -> dict | None:
    """What a torch_dist checkpoint in ``folder`` holds besides tensors: arguments, iteration, schedule; else None.

    Args:
        folder: of the checkpoints and their tracker file.
        step: ``--ckpt-step``; without it the checkpoint that the tracker names.
    """
    iteration = step or latest_iteration(folder)
    name = "release" if iteration == 0 else f"iter_{iteration:07d}"
    checkpoint = Path(folder) / name
    if not checkpoint.is_dir():
        source = f"--ckpt-step {step}" if step else "its tracker"
        raise UsageError(f"--load {folder}: {source} names {name}, but {checkpoint} is missing")
    if any(checkpoint.glob("mp_rank_*")):  # --ckpt-format torch
        return None
    try:
        # "torch.distributed is uninitialized": it need not be here. And what torch logs of a damaged checkpoint, 2.14
        # with a traceback, would stand before the one line about it.
        with warnings.catch_warnings(action="ignore"), quiet_logging():
            return _common_state(checkpoint)
    except (KeyboardInterrupt, SystemExit):
        raise
    except UnsafePickle as error:
        safety.verify(checkpoint)  # a damaged name is one that nobody knows
        raise UsageError(
            f"--load {folder}: {checkpoint} asks for {error}, which is not among what checkpoints hold: nothing of it "
            "was run"
        ) from error
    except BaseException as error:  # torch's CheckpointException is one
        safety.verify(checkpoint)  # names the file, if the checkpoint has a manifest
        raise UsageError(f"--load {folder}: {checkpoint} is damaged or incomplete ({type(error).__name__})") from error


def _common_state(checkpoint: Path) -> dict:
    """The common state, read with an allow-list, and everything else that is no tensor looked at in the same way.

    Megatron unpickles index and objects as they come: its torch.load(weights_only=True) gets what torch's planner has
    loaded without (serialization.py:230, default_planner.py:370).
    """
    _check_objects(checkpoint, (checkpoint / INDEX).stat().st_mtime_ns)
    reader = Reader(checkpoint)
    if COMMON_STATE not in reader.objects:
        return load_common_state_dict(str(checkpoint))  # an older release's common.pt, for which torch has the list
    return reader.read_object(COMMON_STATE)[0]


@functools.lru_cache(maxsize=8)
def _check_objects(checkpoint: Path, written: int) -> None:
    """Once for each checkpoint that a start looks at. Raises UnsafePickle."""
    Reader(checkpoint).check_objects()


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from: the option that names its folder, and the folder."""

    option: str
    folder: str


def starts_from(args: argparse.Namespace) -> Start | None:
    """Where the run's weights come from, None for fresh ones."""
    for option, folder in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if _has_checkpoint(folder, args.ckpt_step):
            return Start(option, folder)  # Megatron takes the other only where --load has none
    return None


def check_router_matches(args: argparse.Namespace) -> None:
    """Refuses a checkpoint of another router type or state width. Raises UsageError naming both sides."""
    start = starts_from(args)
    if start is not None:
        _check_saved_router(args, start.option, start.folder)


def check_nothing_left_out(args: argparse.Namespace) -> None:
    """Refuses to go on from a checkpoint without optimizer or random numbers, unless told to do without.

    Megatron stops at a KeyError for the one, and goes on with fresh random numbers without a word for the other.
    """
    if args.load is None or args.finetune or args.skip_train:
        return
    saved = saved_arguments(args.load, args.ckpt_step)
    for kind, without in (("optim", "a fresh optimizer"), ("rng", "fresh random numbers")):
        if getattr(saved, f"no_save_{kind}", None) and not getattr(args, f"no_load_{kind}"):
            raise UsageError(
                f"--load {args.load}: the checkpoint was saved with --no-save-{kind}: add --no-load-{kind} to go on "
                f"with {without}"
            )


def _has_checkpoint(folder: str | None, step: int | None) -> bool:
    if folder is not None and step and Path(folder, f"iter_{step:07d}").is_dir():
        return True
    return latest_iteration(folder) is not None


def _check_saved_router(args: argparse.Namespace, option: str, folder: str) -> None:
    saved = saved_arguments(folder, args.ckpt_step)
    if saved is None:
        return
    if args.ckpt_format == "torch":
        raise UsageError(
            f"{option} {folder} has a checkpoint of format torch_dist, which --ckpt-format torch cannot load: leave it "
            "out (the other way round works), or convert the checkpoint with --ckpt-convert-format"
        )
    if args.load_main_params_from_ckpt:  # state_dict["model"] (checkpointing.py:2614) holds the model's own parameters
        raise UsageError(
            f"--load-main-params-from-ckpt: {option} {folder} is a torch_dist checkpoint, which Megatron loads into "
            "the model's precision first: the main parameters would be rounded all the same; leave it out"
        )
    saved_type = getattr(saved, "moe_router_type", "linear")  # written without this package
    if saved_type == "linear" and args.moe_router_upcycle:
        return
    if saved_type != args.moe_router_type:
        upcycle = ", or --moe-router-upcycle to start from all its weights but the router's" * (saved_type == "linear")
        raise UsageError(
            f"{option} {folder}: the checkpoint's router is {saved_type}, this run's is {args.moe_router_type}; "
            f"use --moe-router-type {saved_type}, or another --save/--run-name for a new run{upcycle}"
        )
    theirs, ours = getattr(saved, "moe_null_experts", 0), args.moe_null_experts
    if theirs != ours:
        raise UsageError(
            f"{option} {folder}: the checkpoint was trained with {null_experts.OPTION} {theirs}, this run has {ours}"
        )
    if option == "--load":  # only weights are taken from the other
        _check_optimizer_state_fits(args, saved)
    for argument in get_router_type(args.moe_router_type).arguments:
        ours = getattr(args, argument.dest)
        theirs = getattr(saved, argument.dest, argument.default)  # as before there was the argument
        if argument.kept and ours != theirs:
            raise UsageError(
                f"{option} {folder}: the checkpoint was trained with {argument.option} {theirs}, this run has {ours}"
            )


def _check_optimizer_state_fits(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Weights load into either backend, but an optimizer checkpoint in gradient-buffer order only into its own."""
    saved_backend = getattr(saved, "moe_backend", MEGATRON)
    if saved_backend == args.moe_backend or args.no_load_optim or args.finetune:
        return
    distributed, reshardable, left_out = (
        getattr(saved, name, False)
        for name in ("use_distributed_optimizer", "dist_ckpt_optim_fully_reshardable", "no_save_optim")
    )
    if distributed and not (reshardable or left_out):
        raise UsageError(
            f"--load {args.load}: the checkpoint was saved with --moe-backend {saved_backend}, and its optimizer state "
            f"does not fit {args.moe_backend}'s experts: add --no-load-optim for the weights alone, or save it again "
            "with --dist-ckpt-optim-fully-reshardable"
        )
