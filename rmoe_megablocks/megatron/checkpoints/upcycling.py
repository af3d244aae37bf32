"""A recurrent model that starts from the weights of a linear one: everything but routing comes from the checkpoint."""

import argparse
from functools import partial

import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.checkpointing import get_load_checkpoint_path_by_args

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import compatibility
from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from rmoe_megablocks.routing import get_router_type

OPTION = "--moe-router-upcycle"
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")


def choose(args: argparse.Namespace) -> list[str]:
    """Decides what ``--moe-router-upcycle`` means now, with the run's folders chosen. Returns lines for the user.

    The first time, ``args`` become those of a run that starts at iteration 0 from a linear checkpoint; once the run
    has a recurrent checkpoint in --save, those of a run that resumes it, as without the option. Raises UsageError.
    """
    if not args.moe_router_upcycle:
        return []
    if not get_router_type(args.moe_router_type).replaces_hosts:
        raise UsageError(f"{OPTION} turns a linear checkpoint into a recurrent model: add --moe-router-type gru")
    if (iteration := _iteration(args.save, "--save")) is not None:
        if _router_of(args.save, "--save", iteration) == "linear":
            raise UsageError(
                f"{OPTION}: --save {args.save} already has checkpoints of the linear model; choose another "
                "--save/--run-name for the new one and name the old one with --load"
            )
        args.moe_router_upcycle = False
        args.load, args.pretrained_checkpoint, args.ckpt_step = args.save, None, None
        return [f"{OPTION}: done before, {args.save} has checkpoints of the recurrent model"]
    sources = (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint))
    iterations = ((*source, _iteration(source[1], source[0], args.ckpt_step)) for source in sources)
    found = [source for source in iterations if source[2] is not None]
    if not found:
        raise UsageError(f"{OPTION}: name a linear checkpoint to start from with --load or --pretrained-checkpoint")
    option, folder, iteration = found[0]
    router = _router_of(folder, option, iteration)
    if router != "linear":
        raise UsageError(f"{OPTION}: {option} {folder} already has a {router} router; leave {OPTION} out to load it")
    args.load, args.pretrained_checkpoint = folder, None
    args.finetune = args.no_load_optim = args.no_load_rng = True
    return [
        f"{OPTION}: weights from {folder} except routing, which starts afresh, as do the optimizer, the data and the "
        "iteration (--finetune --no-load-optim --no-load-rng)"
    ]


def _iteration(folder: str | None, option: str, step: int | None = None) -> int | None:
    return None if folder is None else checkpoint_files.choose(folder, option, step).iteration


def _router_of(folder: str, option: str, iteration: int) -> str:
    saved = compatibility.saved_arguments(folder, iteration)
    if saved is None:
        raise UsageError(
            f"{OPTION}: {option} {folder} was saved with --ckpt-format torch; load it as a linear model and save it "
            "with --ckpt-convert-format torch_dist first"
        )
    return getattr(saved, "moe_router_type", "linear")


def keep_fresh_routing(chunks: list[GPTModel], args: argparse.Namespace) -> list[GPTModel]:
    """Has the next load into ``chunks`` leave routing parameters as they are; every load and save after it is whole.

    Every other tensor has to be in the checkpoint, and every other tensor of its model in ``chunks``: UsageError on
    all ranks otherwise. Megatron would fall back to a load of what fits.
    """
    asked: set[str] = set()
    for chunk in chunks:
        chunk.sharded_state_dict = partial(_without_routing, chunk, asked, chunk is chunks[-1], args)
        chunk.load_state_dict = partial(_with_own_routing, chunk)
    return chunks


def is_routing(name: str) -> bool:
    """Tells whether a parameter, buffer or checkpoint key, of either router type, belongs to routing."""
    return ".mlp.router." in name or name.startswith("rnn_router.")


def _without_routing(chunk: GPTModel, asked: set[str], last: bool, args, *arguments, **kwargs) -> dict:
    del chunk.sharded_state_dict
    entries = chunk.sharded_state_dict(*arguments, **kwargs)
    kept = {name: entry for name, entry in entries.items() if not is_routing(name)}
    asked |= set(_tensor_keys(kept))
    if last:
        _check_nothing_else_differs(asked, args)
    return kept


def _tensor_keys(entries: dict):
    for entry in nested_values(entries):
        if isinstance(entry, ShardedTensorFactory):
            yield from _tensor_keys({"parts": entry.build()})
        elif isinstance(entry, ShardedTensor):
            yield entry.key


def _check_nothing_else_differs(asked: set[str], args: argparse.Namespace) -> None:
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, asked)
    ours = set().union(*everywhere)
    saved = load_tensors_metadata(get_load_checkpoint_path_by_args(args))
    theirs = {key for key in saved if not (key.startswith(OPTIMIZER_PREFIXES) or is_routing(key))}
    for keys, problem in ((ours - theirs, "lacks"), (theirs - ours, "has, and this model lacks,")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UsageError(
                f"{OPTION}: the checkpoint in {args.load} {problem} {min(keys)}{more}; build the model with the "
                "arguments that it was trained with"
            )


def _with_own_routing(chunk: GPTModel, state_dict: dict, *arguments, **kwargs):
    del chunk.load_state_dict
    own = {name: value for name, value in chunk.state_dict().items() if is_routing(name)}
    return chunk.load_state_dict({**state_dict, **own}, *arguments, **kwargs)
