"""A run: its arguments made complete, its folder and its data, checked before anything is built."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rmoe_megablocks import data, run_lock
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.checkpoints import compatibility, model, options, resharding, schedule, upcycling
from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from rmoe_megablocks.megatron.checks import refusals, rehearsal
from rmoe_megablocks.megatron.command_line import router_arguments
from rmoe_megablocks.megatron.inputs import batch_schedule, datasets
from rmoe_megablocks.megatron.monitoring import nonfinite
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.megatron.recurrence.shared import fits_default_optimizer_checkpoint

_SAYS_WHERE_TO_START = (
    *("load", "ckpt_step", "pretrained_checkpoint", "exit_on_missing_checkpoint"),
    *("finetune", "no_load_optim", "no_load_rng", "moe_router_upcycle"),
)


@dataclasses.dataclass
class Run:
    """What the entry needs beside Megatron's arguments.

    Attributes:
        args: arguments, complete and validated by :func:`resolve`.
        folder: RUNS_DIR/RUN_NAME; metrics, summary, logs and, unless --save says otherwise, checkpoints.
        dataset: folder of the prepared dataset, None for Megatron's own data arguments without one.
        metadata: of the dataset; bits per byte need its byte counts.
        notes: lines to tell the user.
        argv: the arguments as Megatron parses them.
        config: the same as MODEL_ARGS, which start the same run.
        asked: where to start from, as ``args`` said before it was decided.
    """

    args: argparse.Namespace
    folder: Path
    dataset: Path | None
    metadata: data.DatasetMetadata | None
    notes: list[str]
    argv: list[str]
    config: dict[str, object]
    asked: dict[str, object] = dataclasses.field(default_factory=dict)

    def restart(self) -> str:
        """What the same command would start from now, in words."""
        args = argparse.Namespace(**(vars(self.args) | self.asked))
        try:
            upcycling.choose(args)
            _choose_checkpoint(args)
        except UsageError as error:
            return f"the same command will say: {error}"
        folder = args.load or args.pretrained_checkpoint
        if folder is None:
            return "there is no complete checkpoint: the same command starts from the beginning"
        iteration = f"iteration {args.ckpt_step or 0} in {folder}"
        afresh = args.finetune or args.load is None
        return f"the same command {'starts afresh from the weights of' if afresh else 'continues from'} {iteration}"

    def check_unlocked(self) -> None:
        """Raises :class:`rmoe_megablocks.run_lock.Held` if another run writes where this one would."""
        for folder, option in self._written():
            run_lock.check(folder, option, _say)

    def lock(self) -> contextlib.ExitStack:
        """Takes the run's folders for this process alone, until the result is closed. Raises as check_unlocked."""
        with contextlib.ExitStack() as locks:
            for folder, option in self._written():
                locks.callback(run_lock.acquire(folder, option, _say).release)
            return locks.pop_all()

    def _written(self) -> list[tuple[Path, str]]:
        """The run's folder and that of its checkpoints, which two runs of different names may share."""
        return [(self.folder, "--run-name"), *([(Path(self.args.save), "--save")] if self.args.save else [])]


def _say(line: str) -> None:
    print(f"rmoe: {line}", file=sys.stderr, flush=True)


def resolve(argv: Sequence[str], world_size: int | None = None, scratch: Path | None = None) -> Run:
    """Parses and completes ``argv`` and checks everything that can be checked without building a model.

    Args:
        argv: Megatron's arguments and ours.
        world_size: number of processes, None to take what torchrun says.
        scratch: a temporary folder for the embedded dataset, if it is not there yet: no other folder is made then.

    Raises:
        UsageError: one clear line.
    """
    args = arguments.parse(argv)
    notes = arguments.fill_defaults(args)
    if args.ckpt_format == "torch_dist" and not args.no_verify_integrity:
        args.verify_integrity = True  # its manifest also tells a complete checkpoint from a partial one
    if world_size is not None:
        args.world_size = world_size
    check_world_size(args)
    refusals.check_router_arguments(args)
    if args.num_experts:
        refusals.check_available(args)
    options.check(args)
    arguments.check_run_name(args.run_name)
    folder = Path(args.runs_dir) / args.run_name
    _choose_folders(args, folder, make=scratch is None)
    asked = {name: getattr(args, name) for name in _SAYS_WHERE_TO_START}
    notes += batch_schedule.choose(args)
    notes += upcycling.choose(args)
    checkpoint_note = _choose_checkpoint(args)
    chosen = datasets.choose(args, datasets.reads_ids_here(world_size), scratch)
    compatibility.check_router_matches(args)
    arguments.validate(args)
    rehearsal.rehearse(args)
    notes += model.check(args) + null_experts.notes(args)
    compatibility.check_nothing_left_out(args)
    resharding.check_optimizer_layout(args)
    checkpoint_notes = [] if args.moe_router_upcycle else [*checkpoint_note, *schedule.choose(args)]
    nonfinite.choose(args)
    notes += choose_optimizer_checkpoint(args) + checkpoint_notes + chosen.notes
    run = Run(args, folder, chosen.dataset, chosen.metadata, notes, args.argv, args.as_config, asked)
    del args.explicit, args.argv, args.as_config  # Megatron saves its arguments with every checkpoint
    return run


def check_world_size(args: argparse.Namespace) -> None:
    """Refuses fewer processes than one replica takes, and numbers that replicas do not divide."""
    size = arguments.layout_size(args)
    if args.world_size < size or args.world_size % size:
        raise UsageError(
            f"{args.world_size} process{'es' * (args.world_size != 1)} for a layout of {size} "
            f"(tensor {args.tensor_model_parallel_size} x pipeline {args.pipeline_model_parallel_size} x context "
            f"{args.context_parallel_size}, experts over {args.expert_model_parallel_size}): "
            f"start a multiple of {size} with --nproc-per-node, or change the layout"
        )


def _choose_folders(args: argparse.Namespace, folder: Path, make: bool) -> None:
    arguments.check_writable(folder, "--runs-dir", make)
    if args.no_checkpoints:
        args.save = None
    else:
        args.save = args.save or str(folder / "checkpoints")
        arguments.check_writable(Path(args.save), "--save", make)
    if args.save_interval is None:
        args.save_interval = args.train_iters or 1000
    if args.eval_interval is None:
        args.eval_interval = args.train_iters or 1000
    if args.tensorboard_dir is None:
        args.tensorboard_dir = str(folder / "tensorboard")
    if args.data_cache_path is None:
        args.data_cache_path = str(folder / "data_cache")


def _choose_checkpoint(args: argparse.Namespace) -> list[str]:
    """Decides what the run starts from and says so; the same command again resumes.

    Megatron gets the choice as --ckpt-step, so that every rank loads what was decided here, and what was checked.
    """
    option, folder = ("--load", args.load) if args.load else ("--save", args.save)
    choice = None
    if folder is not None and not (args.load is None and args.pretrained_checkpoint and _is_empty(folder)):
        choice = checkpoint_files.choose(folder, option, args.ckpt_step)
    if choice is None or choice.iteration is None:
        if args.load is not None and args.load != args.save:
            raise UsageError(f"--load {args.load}: no checkpoint there (latest_checkpointed_iteration.txt is missing)")
        if args.exit_on_missing_checkpoint and args.pretrained_checkpoint is None:
            raise UsageError(
                f"--exit-on-missing-checkpoint: there is no checkpoint in {folder}: name its folder with --load"
                if folder is not None
                else "--exit-on-missing-checkpoint: there is no folder to look in: name one with --load"
            )
        notes = [choice.note] if choice and choice.note else []
        args.load = None  # an empty tracker would end Megatron
        if args.pretrained_checkpoint is None:
            if args.finetune:
                raise UsageError("--finetune: there is no checkpoint to take the weights from: name one with --load")
            if args.skip_train:
                notes.append("--skip-train: there is no checkpoint, so the model that is evaluated was never trained")
            return notes
        choice = checkpoint_files.choose(args.pretrained_checkpoint, "--pretrained-checkpoint", args.ckpt_step)
        if choice.iteration is None:
            raise UsageError(f"--pretrained-checkpoint {args.pretrained_checkpoint}: no checkpoint there")
        args.ckpt_step = choice.iteration or None
        return notes
    args.load, args.ckpt_step = folder, choice.iteration or None
    args.pretrained_checkpoint = None  # Megatron takes it only where --load has none, and tells by the tracker alone
    return [choice.note] if choice.note else []


def _is_empty(folder: str) -> bool:
    """Whether nothing was ever saved there: --ckpt-step then speaks of --pretrained-checkpoint."""
    return not (checkpoint_files.iterations(Path(folder)) or Path(folder, checkpoint_files.TRACKER).exists())


def choose_optimizer_checkpoint(args: argparse.Namespace) -> list[str]:
    """Picks the optimizer checkpoint format that can hold a small shared recurrence over many data-parallel ranks."""
    router_type = router_arguments.router_type(args)
    if not (router_type.replaces_hosts and args.use_distributed_optimizer) or args.dist_ckpt_optim_fully_reshardable:
        return []
    ranks = args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    if fits_default_optimizer_checkpoint(router_type, router_arguments.routing_config(args), ranks):
        return []
    args.dist_ckpt_optim_fully_reshardable = True
    return ["what layers share is too small for the default optimizer checkpoint: --dist-ckpt-optim-fully-reshardable"]
