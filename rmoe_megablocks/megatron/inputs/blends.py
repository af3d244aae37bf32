"""Megatron's own data arguments: which datasets they name, with what weights, and which part of each a split takes."""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from rmoe_megablocks import data
from rmoe_megablocks.errors import UsageError

SPLITS = ("train", "valid", "test")
_ONE_FOR_ALL = ("data_path", "data_args_path")
_PER_SPLIT = tuple(f"{split}_data_path" for split in SPLITS)
ARGUMENTS = (*_ONE_FOR_ALL, *_PER_SPLIT, "per_split_data_args_path")
_DEFAULT_SPLIT = "969,30,1"  # Megatron's
_WEIGHTS = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(,\s*(\d+\.?\d*|\.\d+)\s*){0,2}")


@dataclass(frozen=True)
class Blend:
    """The datasets of one argument: their prefixes, and a weight for each unless Megatron takes their sizes."""

    option: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def option(name: str) -> str:
    """The command line's name of an argument."""
    return "--" + name.replace("_", "-")


def read(args: argparse.Namespace) -> dict[str, Blend]:
    """The blend of each split that has one. Completes ``args``: lists in files become the arguments they stand for.

    Raises:
        UsageError: no single source of data is named, a list cannot be read, or it has no datasets or odd weights.
    """
    named = [name for name in ARGUMENTS if getattr(args, name) is not None]
    per_split = [name for name in named if name in _PER_SPLIT]
    sources = [name for name in named if name not in per_split] + per_split[:1]
    if len(sources) > 1:
        raise UsageError(f"{option(sources[0])} and {option(sources[1])} both name the data: keep one")
    if sources[0] in _ONE_FOR_ALL:
        return _one_for_all(args, sources[0])
    if args.split is not None:
        raise UsageError(
            f"--split {args.split} cuts up --data-path; {option(sources[0])} names the splits: leave it out"
        )
    if args.per_split_data_args_path is not None:
        blends = _read_per_split_file(args)
    else:
        blends = {name: _blend(option(name), getattr(args, name)) for name in per_split}
    blends = {name.removesuffix("_data_path"): blend for name, blend in blends.items()}
    if "train" not in blends and not args.skip_train:
        raise UsageError(f"{next(iter(blends.values())).option} without --train-data-path: name what to train on")
    return blends


def tokens_of(prefix: str, split: str, weights: str | None) -> int:
    """How many tokens of ``prefix`` the split takes: documents by Megatron's --split ``weights``, else all of them."""
    lengths = data.read_index(prefix).lengths
    if weights is None:
        return int(lengths.sum(dtype=np.int64))
    part = split_matrix(weights)[SPLITS.index(split)]
    if part is None:
        return 0
    first, last = (int(round(end * float(len(lengths)))) for end in part)  # as BlendedMegatronDatasetBuilder does
    return int(lengths[first:last].sum(dtype=np.int64))


def split_matrix(weights: str) -> list[tuple[float, float] | None]:
    """Where Megatron's --split begins and ends each split, as shares of the documents; None for one left out."""
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(weights))


def _one_for_all(args: argparse.Namespace, name: str) -> dict[str, Blend]:
    words = args.data_path if name == "data_path" else _read(name, args.data_args_path).split()
    blend = _blend(option(name) if name == "data_path" else f"{option(name)} {args.data_args_path}", words)
    args.data_path, args.data_args_path = list(words), None
    if args.split is None:
        args.split = _DEFAULT_SPLIT
    # Megatron looks for digits and dots, and takes 1e-1 for 1 and 1, -5 for 5
    if not _WEIGHTS.fullmatch(args.split) or not any(map(float, args.split.split(","))):
        raise UsageError(f"--split {args.split}: up to three weights, as 969,30,1 for train, valid and test")
    matrix = split_matrix(args.split)
    if matrix[0] is None and not args.skip_train:
        raise UsageError(f"--split {args.split} leaves nothing to train on: give train a weight")
    return {split: blend for split, part in zip(SPLITS, matrix, strict=True) if part is not None}


def _read_per_split_file(args: argparse.Namespace) -> dict[str, Blend]:
    path = args.per_split_data_args_path
    where = f"--per-split-data-args-path {path}"
    text = _read("per_split_data_args_path", path)
    try:
        lists = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(lists, dict) or set(lists) != set(SPLITS):
        raise UsageError(f"{where}: expected an object with the keys train, valid and test (null to leave one out)")
    blends = {}
    for split, words in lists.items():
        if isinstance(words, str):
            words = words.split()
        if words is None:
            continue
        if not isinstance(words, list) or not all(type(word) in (str, int, float) for word in words):
            raise UsageError(f"{where}: {split} has to be a list of prefixes and weights, or a string of them")
        words = list(map(str, words))
        blends[f"{split}_data_path"] = _blend(f"{where} ({split})", words)
        setattr(args, f"{split}_data_path", words)
    args.per_split_data_args_path = None
    if not blends:
        raise UsageError(f"{where}: names no data")
    return blends


def _read(name: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"{option(name)} {path}: cannot be read ({reason})") from None


def _blend(name: str, words: list[str]) -> Blend:
    """Reads ``words`` as Megatron does: pairs of weight and prefix if they are even and every other one is a number."""
    if not words:
        raise UsageError(f"{name}: names no dataset")
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 == 0 and None not in weights:
        for word, weight, prefix in zip(words[::2], weights, words[1::2], strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UsageError(f"{name}: the weight {word} of {prefix} is not above 0: leave the dataset out")
        blend = Blend(name, tuple(words[1::2]), tuple(weights))
    else:
        blend = Blend(name, tuple(words), None)
    for prefix in blend.prefixes:
        _check_files(blend, prefix)
    return blend


def _check_files(blend: Blend, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if Path(prefix + suffix).is_file():
            continue
        if _number(prefix) is not None:
            raise UsageError(
                f"{blend.option}: {prefix} is taken for a dataset, not for a weight: "
                "write WEIGHT PREFIX WEIGHT PREFIX, a weight for each or for none"
            )
        if prefix.endswith((".bin", ".idx")):
            raise UsageError(f"{blend.option} {prefix}: a prefix is wanted, without its {prefix[-4:]}")
        raise UsageError(f"{blend.option} {prefix}: {prefix}{suffix} does not exist; make it with 'rmoe data prepare'")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
