"""A checkpoint of Megatron that is named on the command line: found, checked, and its model described."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks.conversion.mapping import checkpoint as mapped
from rmoe_megablocks.conversion.mapping.configuration import config_of
from rmoe_megablocks.conversion.mapping.weights import entries
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import files, safety
from rmoe_megablocks.routing.registry import router_types
from rmoe_megablocks.torch_dist.reading import COMMON_STATE, Reader
from rmoe_megablocks.torch_dist.unpickling import INDEX, UnsafePickle

#: what this reads and writes, as Megatron-Core's metadata.json says it
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Source:
    """One checkpoint.

    Attributes:
        folder: the checkpoint's own.
        args: of the run that saved it.
        iteration: at which it was saved.
        config: config.json of the model.
        weights: where its tensors lie.
    """

    folder: Path
    args: argparse.Namespace
    iteration: int
    config: Mapping[str, Any]
    weights: mapped.Weights


def locate(checkpoint: Path, step: int | None) -> Path:
    """The folder of one checkpoint, from itself or from the one above with its tracker file.

    Raises:
        UsageError: there is none, or the tracker and what is there do not agree: nothing older is taken instead.
    """
    if not checkpoint.is_dir():
        raise UsageError(f"{checkpoint}: no such folder")
    if (checkpoint / INDEX).exists() or (checkpoint / files.CONFIG).exists():
        if step:
            raise UsageError(
                f"--ckpt-step {step}: {checkpoint} is one checkpoint; name the folder above, or leave it out"
            )
        return checkpoint
    choice = files.choose(checkpoint, "CHECKPOINT", step)
    if choice.iteration is None:
        raise UsageError(f"{checkpoint}: no checkpoint there ({files.TRACKER} is missing)")
    found = checkpoint / (f"iter_{choice.iteration:07d}" if choice.iteration else "release")
    if not found.is_dir():
        raise UsageError(f"{checkpoint}: {files.TRACKER} names {found.name}, which is missing")
    return found


def check_format(folder: Path) -> None:
    """Raises UsageError for a checkpoint of another format, or of a newer one."""
    if any(folder.glob("mp_rank_*")):
        raise UsageError(
            f"{folder} was saved with --ckpt-format torch: convert it first with --ckpt-convert-format torch_dist"
        )
    try:
        said = json.loads((folder / files.CONFIG).read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{folder} is incomplete: it has no {files.CONFIG}") from None
    except ValueError:
        raise UsageError(f"{folder} is damaged: {files.CONFIG} is no JSON") from None
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend != FORMAT["sharded_backend"]:
        raise UsageError(f"{folder} is of format {backend}, expected {FORMAT['sharded_backend']}")
    if said.get("sharded_backend_version") != FORMAT["sharded_backend_version"]:
        raise UsageError(
            f"{folder} is of version {said.get('sharded_backend_version')} of its format, version "
            f"{FORMAT['sharded_backend_version']} is known: use a newer rmoe-megablocks"
        )


def open_source(
    checkpoint: Path,
    step: int | None,
    vocab_size: int | None,
    trusts_router: bool = False,
    any_vocabulary: bool = False,
) -> Source:
    """Reads everything but the weights.

    Args:
        checkpoint: as :func:`locate`.
        step: ``--ckpt-step``.
        vocab_size: of the tokenizer, where the run's arguments lack it.
        trusts_router: whether a router type of somebody's module may be imported.
        any_vocabulary: for who does not ask which rows are padding.

    Raises:
        UsageError: one line that names what is damaged, missing, unsafe, or what the written model cannot express.
    """
    folder = locate(checkpoint, step)
    check_format(folder)
    safety.verify(folder)
    reader, common = _read(folder)
    args = common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise UsageError(f"{folder} does not hold the arguments of its run, so its model is not known")
    check_router(getattr(args, "moe_router_type", "linear"), trusts_router, str(folder))
    size = 1 if any_vocabulary else vocabulary(args, vocab_size, folder)
    try:
        config = config_of(args, size)
        found = mapped.find(reader, entries(config), config)
    except UsageError:
        raise
    except (AttributeError, ValueError, TypeError) as error:  # arguments that no run of ours or Megatron's saves
        raise UsageError(f"{folder}: the arguments of its run are not those of a GPT model ({error})") from error
    return Source(folder, args, int(common.get("iteration") or 0), config, found)


def _read(folder: Path) -> tuple[Reader, dict]:
    try:
        reader = Reader(folder)
        names = [name for name in reader.objects if name.partition("/")[0] == "common_state"]
        if names != [COMMON_STATE]:
            raise UsageError(
                f"{folder} was saved by an older Megatron: it has no {COMMON_STATE}; load and save it once more"
            )
        (common,) = reader.read_object(COMMON_STATE)
    except UnsafePickle as error:
        raise UsageError(
            f"{folder} asks for {error}, which is not among what checkpoints hold: nothing of it was run"
        ) from error
    except (UsageError, OSError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # a damaged pickle raises anything; the export ends here
        raise UsageError(f"{folder} is damaged or incomplete ({type(error).__name__})") from error
    return reader, common


def check_router(router_type: Any, trusted: bool, where: str) -> None:
    """Raises UsageError for a router of a module that would have to be imported, unless that was asked for."""
    if not isinstance(router_type, str):
        raise UsageError(f"{where}: the router type {router_type!r} is no name")
    if router_type not in router_types() and not trusted:
        hint = "; if you trust that module, add --trust-router-code" if ":" in router_type else ""
        raise UsageError(f"{where}: the router type {router_type} is not one of this package{hint}")


class UnknownVocabulary(UsageError):
    """The checkpoint does not say how large its vocabulary is; the tokenizer of ``args_of_run`` may."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        super().__init__(f"{folder} does not say how large its vocabulary is: name the tokenizer with --tokenizer")
        self.args_of_run = args


def vocabulary(args: argparse.Namespace, vocab_size: int | None, folder: Path) -> int:
    """Tokens of the vocabulary, without the rows that Megatron adds."""
    said, padded = getattr(args, "vocab_size", None), getattr(args, "padded_vocab_size", None)
    size = said or vocab_size
    if not size:
        raise UnknownVocabulary(folder, args)
    if padded and size > padded:
        raise UsageError(f"the tokenizer has {size} tokens, the checkpoint's vocabulary {padded}: it is another one")
    return int(size)


def parameters(config: Mapping[str, Any]) -> int:
    """Of the written model."""
    return sum(math.prod(shape) for entry in entries(config) for shape in entry.shapes)
