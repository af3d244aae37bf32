"""What a run trains and is evaluated on: a prepared dataset or Megatron's own data arguments, checked beforehand."""

import argparse
import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tqdm import tqdm

from rmoe_megablocks import data
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.inputs import blends, responses
from rmoe_megablocks.megatron.inputs.blends import SPLITS, Blend

CHECKED = "RMOE_DATA_CHECKED"  # set by the launcher for the processes it starts

_NULL = "NullTokenizer"
_KINDS = {
    "bytes": (_NULL,),
    "sentencepiece": ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
}
_SIZED = (_NULL, "NullMultimodalTokenizer", "TikTokenizer")  # take their size from --vocab-size
_EOD_OPTIONS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
# Megatron's arguments that a dataset of batches.py does not heed
_NOT_HEEDED = (
    "fim_data",
    "sft",
    "dataloader_fast_cache_load",
    "dataloader_defer_npy_index_mmap",
    "dataloader_inter_document_masking",
    "per_dataset_sequences_path",
    "object_storage_cache_path",
    "hybrid_context_parallel",
)


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        dataset: folder of the prepared dataset, None for Megatron's own data arguments.
        metadata: of the prepared dataset.
        notes: lines to tell the user.
    """

    dataset: Path | None
    metadata: data.DatasetMetadata | None
    notes: list[str]


def choose(args: argparse.Namespace, reads_ids: bool, scratch: Path | None = None) -> Data:
    """Completes Megatron's data and tokenizer arguments, from the embedded dataset where nothing is named.

    Args:
        args: parsed, not yet validated.
        reads_ids: whether this process reads whole datasets that say nothing about their ids.
        scratch: a temporary folder for the embedded dataset, if it is not there yet.

    Raises:
        UsageError: the data is missing, named twice, damaged, too short, or holds ids that the model does not have.
    """
    _check_heeded(args)
    named = [name for name in blends.ARGUMENTS if getattr(args, name) is not None]
    if args.mock_data:
        if named:
            raise UsageError(f"--mock-data and {blends.option(named[0])} both name the data: keep one")
        return Data(None, None, [f"--mock-data: {args.dataset} is not used"] if args.dataset else [])
    if args.dataset and named:
        raise UsageError(f"--dataset and {blends.option(named[0])} both name the data: keep one")
    if named:
        default = args.split is None and named[0] in ("data_path", "data_args_path")
        found = blends.read(args)
        notes = [f"--split is missing: Megatron's own, {args.split}"] if default else []
        chosen = Data(None, None, notes + _check_blends(args, found, reads_ids))
    else:
        chosen = _prepared(args, scratch)
    responses.check(args)
    return chosen


def evaluated_splits(metadata: data.DatasetMetadata) -> list[str]:
    """Splits to evaluate exactly: those with a token to predict."""
    return [split for split in ("valid", "test") if metadata.splits[split].tokens > 1]


def reads_ids_here(world_size: int | None) -> bool:
    """Whether this process is the one of a run that reads its datasets: the launcher, else rank 0."""
    if world_size is not None:
        return True
    return os.environ.get("RANK", "0") == "0" and CHECKED not in os.environ


def _check_heeded(args: argparse.Namespace) -> None:
    for name in _NOT_HEEDED:
        if getattr(args, name, None):
            raise UsageError(f"{blends.option(name)} has no effect on the datasets of this entry: leave it out")
    if args.dataloader_type == "external":
        raise UsageError("--dataloader-type external: this entry builds the loaders itself; use single or cyclic")
    if args.multiple_validation_sets and not args.full_validation:
        raise UsageError("--multiple-validation-sets needs --full-validation")
    if args.full_validation and not args.multiple_validation_sets:
        raise UsageError("--full-validation ends Megatron at the first evaluation: add --multiple-validation-sets")


def _prepared(args: argparse.Namespace, scratch: Path | None) -> Data:
    if args.split is not None:
        raise UsageError(f"--split {args.split} cuts up --data-path; a prepared dataset is cut already: leave it out")
    if args.dataset:
        dataset = data.dataset_dir(args.dataset)
    else:
        dataset = Path(args.runs_dir) / "data" / "enwik8_1mb"
        if scratch is not None and not dataset.exists():
            dataset = scratch / dataset.name
        data.prepare_embedded(dataset)
    metadata = data.DatasetMetadata.load(dataset)
    _choose_tokenizer(args, dataset, metadata)
    _choose_end_of_document(args, f"the dataset {dataset}", metadata)
    paths = {split: [str(dataset / split)] for split in SPLITS if metadata.splits[split].tokens}
    for split in SPLITS:
        setattr(args, f"{split}_data_path", paths.get(split))
    sizes = {split: (str(dataset / split), metadata.splits[split].tokens) for split in SPLITS}
    notes = _leave_out_short_splits(args, sizes, evaluated_splits(metadata))
    if metadata.loss_after is not None:
        notes.append(
            f"{dataset}: the loss is of what follows the line {metadata.loss_after!r}; the exact evaluation at the end "
            "is of whole texts"
        )
    return Data(dataset, metadata, notes)


def _choose_tokenizer(args: argparse.Namespace, dataset: Path, metadata: data.DatasetMetadata) -> None:
    kinds = _KINDS[metadata.tokenizer]
    if args.tokenizer_type is None:
        args.tokenizer_type = kinds[0]
    elif args.tokenizer_type not in kinds:
        raise UsageError(
            f"--tokenizer-type {args.tokenizer_type} does not match the dataset {dataset}, which was tokenized by "
            f"{metadata.tokenizer}: leave it out or use {kinds[0]}"
        )
    if metadata.tokenizer == "bytes":
        args.vocab_size = args.vocab_size or metadata.vocab_size
    elif args.tokenizer_model is None:
        raise UsageError(
            f"--tokenizer-model: the dataset {dataset} was tokenized by {metadata.tokenizer_model}; name it"
        )
    data.check_tokenizer(metadata, metadata.tokenizer, args.tokenizer_model, args.vocab_size)
    _check_model_size(args, metadata.vocab_size)


def _choose_end_of_document(args: argparse.Namespace, what: str, metadata: data.DatasetMetadata) -> None:
    """Has Megatron take the id that documents end in for their end; its own choice is the last id of the vocabulary."""
    used = next((name for name in _EOD_OPTIONS if getattr(args, name)), None)
    if used and metadata.eod_id is None:
        raise UsageError(
            f"{blends.option(used)}: documents of {what} do not end in a token: prepare it with --append-eod"
        )
    if args.tokenizer_type != _NULL or metadata.eod_id is None:
        return
    if args.null_tokenizer_eod_id not in (None, metadata.eod_id):
        raise UsageError(
            f"--null-tokenizer-eod-id {args.null_tokenizer_eod_id}: documents of {what} end in {metadata.eod_id}"
        )
    args.null_tokenizer_eod_id = metadata.eod_id


def _check_blends(args: argparse.Namespace, found: Mapping[str, Blend], reads_ids: bool) -> list[str]:
    prefixes = {prefix: blend.option for blend in found.values() for prefix in blend.prefixes}
    first = next(iter(prefixes.values()))
    if args.tokenizer_type is None:
        raise UsageError(f"{first} needs --tokenizer-type, with its --tokenizer-model or --vocab-size")
    if args.tokenizer_type == _NULL and not args.vocab_size:
        raise UsageError(f"--tokenizer-type {_NULL} needs --vocab-size: how many ids the datasets of {first} have")
    prepared = {prefix: data.metadata_beside(prefix) for prefix in prefixes}
    _check_prepared(args, {prefix: metadata for prefix, metadata in prepared.items() if metadata})
    if reads_ids:
        _check_ids(args, prefixes, prepared)
    for split, blend in found.items():
        if args.full_validation and split == "valid" and blend.weights is not None:
            raise UsageError(f"{blend.option}: --full-validation takes every dataset whole: leave the weights out")
    sizes = {}
    for split in SPLITS:
        members = found[split].prefixes if split in found else ()
        counted = [(prefix, blends.tokens_of(prefix, split, args.split)) for prefix in members]
        sizes[split] = min(counted, key=lambda pair: pair[1], default=("", 0))
    return _leave_out_short_splits(args, sizes, None)


def _check_prepared(args: argparse.Namespace, prepared: Mapping[str, data.DatasetMetadata]) -> None:
    """Prepared datasets among them: one tokenizer for all, and for training."""
    for prefix, metadata in prepared.items():
        first, other = next(iter(prepared.items()))
        same = (metadata.tokenizer, metadata.tokenizer_sha256) == (other.tokenizer, other.tokenizer_sha256)
        if not same or (metadata.eod_id != other.eod_id and any(getattr(args, name) for name in _EOD_OPTIONS)):
            raise UsageError(f"{prefix} and {first} were prepared with different tokenizers: prepare them alike")
        if args.tokenizer_type == _NULL:  # it stands for any
            data.check_tokenizer(metadata, metadata.tokenizer, None, args.vocab_size, compares_model=False)
        elif args.tokenizer_type not in _KINDS[metadata.tokenizer]:
            raise UsageError(
                f"--tokenizer-type {args.tokenizer_type} does not match {prefix}, which was tokenized by "
                f"{metadata.tokenizer}: use {_KINDS[metadata.tokenizer][0]}"
            )
        else:
            data.check_tokenizer(metadata, metadata.tokenizer, args.tokenizer_model)
        _choose_end_of_document(args, prefix, metadata)


def _check_ids(
    args: argparse.Namespace, prefixes: Mapping[str, str], prepared: Mapping[str, data.DatasetMetadata | None]
) -> None:
    """Refuses ids that the tokenizer does not have: a padded row of the embedding would be trained for them."""
    size = _tokenizer_size(args)
    unread = [prefix for prefix in prefixes if not prepared[prefix] and data.read_index(prefix).tokens]
    total = sum(Path(f"{prefix}.bin").stat().st_size for prefix in unread)
    with tqdm(
        desc="checking token ids", total=total, unit="B", unit_scale=True, file=sys.stderr, delay=2, leave=False
    ) as bar:
        for prefix in unread:
            smallest, largest = data.id_range(prefix, bar.update)
            if smallest < 0 or largest >= size:
                id_, place = (smallest, "below 0") if smallest < 0 else (largest, f"the vocabulary has {size:,}")
                raise UsageError(
                    f"{prefixes[prefix]} {prefix}: holds the token id {id_:,}, {place} ({_vocabulary(args)}): "
                    "use the tokenizer that it was made with"
                )
    for prefix, metadata in prepared.items():
        if metadata and metadata.vocab_size > size:
            raise UsageError(
                f"{prefixes[prefix]} {prefix}: holds token ids below {metadata.vocab_size:,}, "
                f"the vocabulary has {size:,} ({_vocabulary(args)})"
            )
    _check_model_size(args, size)


def _tokenizer_size(args: argparse.Namespace) -> int:
    if args.tokenizer_type == _NULL:
        return args.vocab_size
    try:
        return build_tokenizer(copy.copy(args)).vocab_size  # it notes the padded size in what it is given
    except (ValueError, OSError, ImportError, RuntimeError, AssertionError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--tokenizer-type {args.tokenizer_type}: cannot be built ({reason[:200]})") from error


def _check_model_size(args: argparse.Namespace, size: int) -> None:
    """Refuses sizes of the model's vocabulary that do not hold, or do not change, the tokenizer's ``size`` ids."""
    if args.vocab_size not in (None, size) and args.padded_vocab_size is None and args.tokenizer_type not in _SIZED:
        raise UsageError(
            f"--vocab-size {args.vocab_size} has no effect: the tokenizer has {size:,} ids ({_vocabulary(args)}); "
            "leave it out, or give a larger embedding by --padded-vocab-size"
        )
    if args.padded_vocab_size is not None and args.padded_vocab_size < size:
        raise UsageError(f"--padded-vocab-size {args.padded_vocab_size} is less than the vocabulary's {size} ids")


def _vocabulary(args: argparse.Namespace) -> str:
    if args.tokenizer_type == _NULL:
        return f"--vocab-size {args.vocab_size}"
    return f"--tokenizer-type {args.tokenizer_type}" + f" {args.tokenizer_model}" * bool(args.tokenizer_model)


def _leave_out_short_splits(
    args: argparse.Namespace, sizes: Mapping[str, tuple[str, int]], at_end: list[str] | None
) -> list[str]:
    """Has Megatron leave out the evaluation of splits without a whole sequence, of which it would hang or repeat text.

    Args:
        sizes: for each split the shortest of its datasets and how many tokens that has there; 0 for a split without.
        at_end: splits that are evaluated exactly at the end all the same; None where there is no such evaluation.

    Returns:
        Lines that say so.
    """
    if args.seq_length is None:  # refused elsewhere
        return []
    needed = args.seq_length + 1
    short = {split: pair for split, pair in sizes.items() if pair[1] < needed}
    if "train" in short and not args.skip_train:
        prefix, tokens = short["train"]
        raise UsageError(
            f"{prefix}: has {tokens:,} tokens to train on, less than one sequence (--seq-length {args.seq_length} and "
            "the token after it): take a larger split or shorter sequences"
        )
    args.splits_left_out = [split for split in ("valid", "test") if split in short]
    evaluates = args.eval_iters > 0 or args.full_validation
    notes = []
    for split in args.splits_left_out:
        setattr(args, f"{split}_data_path", None)
        prefix, tokens = short[split]
        exactly = at_end is not None and split in at_end
        cut_away = prefix and (
            tokens or at_end is None
        )  # the others have no dataset, or an empty split of a prepared one
        why = f"{prefix} has {tokens:,} tokens there, less than a sequence" if cut_away else "there is no text for it"
        when = "left out during training" if exactly else "left out"
        if evaluates or (at_end is not None and not exactly):
            notes.append(f"evaluation of {split} is {when}: {why}")
    if "valid" in short and evaluates:
        args.eval_iters, args.full_validation = 0, False
        if "test" not in short and at_end is None:
            notes.append("evaluation of test is left out: Megatron does it only where it evaluates valid")
    return notes
