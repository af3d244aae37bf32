"""A text as token ids, and what it holds: a file through a model's tokenizer, or a split of a prepared dataset."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmoe_megablocks import data
from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.measures import Counts, count

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Text:
    """Attributes:
    tokens: [T].
    counts: of all of it.
    split: of a dataset; None for a file.
    unknown: tokens that stand for what the tokenizer lacks.
    notes: lines to tell the user.
    """

    tokens: np.ndarray
    counts: Counts
    split: str | None
    unknown: int
    notes: tuple[str, ...] = ()

    def check(self, name: object) -> "Text":
        """Itself. Raises UsageError if there is nothing to predict."""
        if len(self.tokens) < 2:
            raise UsageError(f"{name} has {len(self.tokens)} tokens: nothing to predict")
        return self


def is_dataset(path: Path) -> bool:
    """Whether ``path`` is a folder that rmoe data prepare has written; else it is a file of text."""
    return path.is_dir()


def of_file(path: Path, tokenizer: Any) -> Text:
    """A text file, compressed or not, through a tokenizer of transformers.

    No token is added, in front or elsewhere, and the spelling of a special token in the text ("<unk>") is text. A
    tokenizer of bytes reads any bytes. Raises UsageError for a file that is empty, or is not UTF-8 and has to be.
    """
    with data.open_text(path) as stream:
        raw = stream.read()
    if not raw:
        raise UsageError(f"{path} is empty")
    if is_bytes(tokenizer):
        return Text(np.frombuffer(raw, np.uint8), count(raw), None, 0).check(path)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start:,}: only a tokenizer of bytes reads that") from None
    tokens = np.array(_ids(tokenizer, text), np.int64)
    unknown = _unknown_in(text, tokens, tokenizer)
    return Text(tokens, count(raw), None, unknown, _unknown(unknown)).check(path)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _unknown_in(text: str, tokens: np.ndarray, tokenizer: Any) -> int:
    """How many tokens are unknown ones that the text itself, as WikiText at word level, does not spell out."""
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None:
        return 0
    spelt = text.split().count(tokenizer.unk_token) if _ids(tokenizer, tokenizer.unk_token) == [unk] else 0
    return max(0, int(np.count_nonzero(tokens == unk)) - spelt)


def of_dataset(folder: Path, split: str) -> tuple[Text, data.DatasetMetadata]:
    """A split of a prepared dataset. Raises UsageError if it is none, or has no such split."""
    metadata = data.DatasetMetadata.load(folder)
    if metadata.splits[split].tokens == 0:
        there = ", ".join(name for name in SPLITS if metadata.splits[name].tokens)
        raise UsageError(f"--split {split}: {folder} has no such split (there: {there})")
    tokens = data.read_tokens(folder / split)
    counts, notes = Counts(metadata.splits[split].bytes), ()
    if metadata.tokenizer == "bytes":
        counts = count(tokens[tokens < 256].astype(np.uint8).tobytes())
    else:
        notes = ("words and characters are not known: a dataset holds tokens; give the text's file for them",)
    if metadata.loss_after is not None:
        notes += (
            f"whole texts: what the training's loss leaves out, to the line {metadata.loss_after!r}, counts here",
        )
    if counts.bytes != metadata.splits[split].bytes:
        raise UsageError(f"{folder / split} is not the text that dataset.json describes: prepare it again")
    return Text(tokens, counts, split, 0, notes + _unknown(metadata.unknown_tokens, " of all splits")).check(
        folder / split
    ), metadata


def check_tokenizer(metadata: data.DatasetMetadata, tokenizer: Any, model: Path | None) -> None:
    """Raises UsageError unless ``tokenizer``, of transformers, gives the ids that a dataset was made with.

    Args:
        model: the SentencePiece model of the dataset, which has its checksum; its pieces are compared.
    """
    made = f"the dataset was prepared with the tokenizer {metadata.tokenizer_model or metadata.tokenizer}"
    if is_bytes(tokenizer) != (metadata.tokenizer == "bytes"):
        raise UsageError(f"{made}, the model's is another one: give the text's file")
    if metadata.eod_id is not None and metadata.eod_id != tokenizer.eos_token_id:
        raise UsageError(
            f"the dataset's documents end in id {metadata.eod_id}, the model's tokenizer ends them in "
            f"{tokenizer.eos_token_id}: give the text's file"
        )
    if metadata.tokenizer == "bytes":
        return
    if model is None:
        raise UsageError(f"{made}: name that file with --tokenizer-model, so that the ids can be compared")
    data.check_tokenizer(metadata, metadata.tokenizer, model)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=os.fspath(model))
    for number in range(pieces.vocab_size()):
        if tokenizer.convert_ids_to_tokens(number) != pieces.id_to_piece(number):
            raise UsageError(
                f"id {number} is {pieces.id_to_piece(number)!r} in {model} and "
                f"{tokenizer.convert_ids_to_tokens(number)!r} in the model's tokenizer: give the text's file"
            )


def is_bytes(tokenizer: Any) -> bool:
    """Whether each id of a tokenizer of transformers is a byte, as in the folders of rmoe export."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    said = json.loads(backend.to_str())
    splits = said["pre_tokenizer"] or {}
    return (
        said["model"]["type"] == "BPE"
        and not said["model"]["merges"]
        and said["model"]["vocab"] == {letter: byte for byte, letter in bytes_to_unicode().items()}
        and said["normalizer"] is None
        and splits.get("type") == "ByteLevel"
        and not splits.get("add_prefix_space")
    )


def checksum(tokens: np.ndarray) -> str:
    """Of the ids, whatever their type on disk: two results with the same one are of the same tokens."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _CHUNK):
        digest.update(tokens[start : start + _CHUNK].astype("<i8").tobytes())
    return digest.hexdigest()


def _unknown(number: int, of: str = "") -> tuple[str, ...]:
    if not number:
        return ()
    return (f"{number:,} tokens{of} stand for text that the tokenizer lacks: what they hide is not predicted",)
