"""Saves that a killed process cannot spoil, and loads that notice damage: what a run adds to Megatron's checkpoints."""

import argparse
import shutil
from pathlib import Path

import torch

from rmoe_megablocks.compat.megatron import checkpoints as megatron_checkpoints
from rmoe_megablocks.compat.megatron import loaders as megatron_loaders
from rmoe_megablocks.errors import CommonError
from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from rmoe_megablocks.megatron.checkpoints.files import MANIFEST, TRACKER, State
from rmoe_megablocks.process import kill_helpers_at_exit


def install(args: argparse.Namespace) -> None:
    """Puts the checks into Megatron for the run that ``args`` describe, in place of those of an earlier one."""
    megatron_checkpoints.load_what_ckpt_step_names()
    megatron_checkpoints.save_indices_atomically()
    megatron_checkpoints.write_tracker(TRACKER, checkpoint_files.write_atomically)
    megatron_checkpoints.seal_manifests(checkpoint_files.seal)
    megatron_checkpoints.keep_errors_of_writers()
    megatron_checkpoints.end_writers_with_their_rank()
    megatron_checkpoints.end_persistent_writers_with_their_rank()
    megatron_checkpoints.end_result_servers_with_their_rank()
    megatron_loaders.end_loaders_with_their_rank()
    kill_helpers_at_exit()
    megatron_checkpoints.verify_loads(verify)
    megatron_checkpoints.prepare_saves(Saves(args))


def check_agreement(args: argparse.Namespace) -> None:
    """Refuses ranks that chose different checkpoints, as where not all machines see the same folder.

    Raises:
        CommonError: on every rank.
    """
    choices: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(choices, (args.load, args.ckpt_step))
    for rank, choice in enumerate(choices):
        if choice != choices[0]:
            raise CommonError(
                f"--load {choices[0][0]}: rank 0 would start from iteration {choices[0][1] or 0}, rank {rank} from "
                f"{choice[1] or 0}: the folder must be the same on all machines"
            )


def verify(folder: Path) -> None:
    """Compares a checkpoint's files with its manifest; one without a manifest passes, and its run has said so.

    Collective where there is a process group. It reads the whole checkpoint once.

    Raises:
        CommonError: on every rank, naming what is damaged.
    """
    if not (folder / MANIFEST).exists():
        return
    damaged = megatron_checkpoints.damaged_files(folder)
    if damaged:
        others = (c for c in checkpoint_files.complete(folder.parent) if c.folder.name != folder.name)
        what = checkpoint_files.listed(damaged)
        raise CommonError(
            f"{folder} is damaged or incomplete: {what} not as saved; {checkpoint_files.instead(next(others, None))}"
        )


class Saves:
    """Decides before each save of a run whether it is needed, and makes room for it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._first = True

    def __call__(self, iteration: int) -> bool:
        """Collective: rank 0 decides and clears, the others write only after it has."""
        needed = [None]
        if torch.distributed.get_rank() == 0:
            needed = [self.prepare(Path(self._args.save), iteration)]
        torch.distributed.broadcast_object_list(needed, src=0)
        return needed[0]

    def prepare(self, folder: Path, iteration: int) -> bool:
        """Readies ``folder`` for a checkpoint of ``iteration``; False if the one it holds is this very one."""
        args = self._args  # asked now: --ckpt-convert-format saves elsewhere than the run would
        if _same(args.load, args.save) and args.ckpt_step and not args.finetune:
            loaded = checkpoint_files.inspect(folder, args.ckpt_step)
            if loaded.iteration == iteration and loaded.state is State.COMPLETE:
                print(f"iteration {iteration} was loaded and not trained further: its checkpoint stays as it is")
                return False
            if self._first:
                make_latest(loaded)
        self._first = False
        clear(checkpoint_files.inspect(folder, iteration).folder)
        return True


def make_latest(loaded: checkpoint_files.Checkpoint) -> None:
    """The checkpoint that the run goes on from is the latest from now on, whatever was saved later and left behind.

    It happens before the first save, not at the start: a run that only looks at an old checkpoint moves nothing.
    """
    folder = loaded.folder.parent
    newest = checkpoint_files.newest_complete(folder)
    if loaded.state is State.COMPLETE and newest.iteration != loaded.iteration:
        checkpoint_files.seal(loaded.folder, checkpoint_files.read_manifest(loaded.folder))
    tracker = folder / TRACKER
    if not tracker.exists() or tracker.read_text().strip() != str(loaded.iteration):
        checkpoint_files.write_atomically(tracker, str(loaded.iteration))


def clear(folder: Path) -> None:
    """Empties a checkpoint's folder, the manifest first: half of an old one must not pass for a complete one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
