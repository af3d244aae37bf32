"""What ``--data`` names, and the texts of token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.texts import checksum

_LABEL = re.compile(r"[^/=.]+(?==.)")


@dataclass(frozen=True)
class Named:
    """One ``--data``: a text or a dataset, and the label that its tokens get."""

    label: str
    path: Path


def named(words: Sequence[str]) -> list[Named]:
    """``LABEL=FILE``, or ``FILE`` whose label is its name. Raises UsageError for what is not there, or named twice."""
    found: list[Named] = []
    for word in words:
        label = _LABEL.match(word)
        if label and not Path(word).exists():
            one = Named(label.group(), Path(word[label.end() + 1 :]))
        else:
            one = Named(Path(word).resolve().name, Path(word))
        if not one.path.exists():
            raise UsageError(f"--data {word}: {one.path}: no such file or folder")
        if one.label in {other.label for other in found}:
            raise UsageError(f"--data {word}: the label {one.label} is there twice: write LABEL=FILE")
        found.append(one)
    return found


def data_entry(named: Named, tokens: np.ndarray) -> dict[str, Any]:
    """One text as a recording tells of it: of the tokens that go in."""
    return {
        "label": named.label,
        "name": named.path.name,
        "tokens": len(tokens),
        "sha256": checksum(tokens),
    }


def vocabulary(ids: Iterable[int], tokenizer: Any | None) -> dict[int, str]:
    """Text of each id; without a tokenizer (of transformers) each id is a byte."""
    if tokenizer is not None:
        from rmoe_megablocks.evaluation.texts import is_bytes

        if not is_bytes(tokenizer):
            return {number: _text(tokenizer, number) for number in ids}
    return {number: _byte(number) for number in ids}


def check_same_tokenizer(first: Any, other: Any) -> None:
    """Raises UsageError for two recordings whose ids stand for different texts: tokens of one are none of the other.

    Of the ids that both have, half at least have one text; how special ones are spelled depends on who recorded them.
    """
    shared = sorted(first.vocabulary.keys() & other.vocabulary.keys())
    unlike = [number for number in shared if first.vocabulary[number] != other.vocabulary[number]]
    if 2 * len(unlike) > len(shared):
        number = unlike[0]
        raise UsageError(
            f"{first.about.name} and {other.about.name} have different tokenizers (id {number} is "
            f"{first.vocabulary[number]!r} and {other.vocabulary[number]!r}), so that figures are of other tokens: "
            "analyze them one by one"
        )


def _byte(number: int) -> str:
    """A byte as the character that it is in ASCII, else by its number."""
    if 32 <= number < 127 or number in (9, 10):
        return chr(number)
    return f"\\x{number:02x}" if number < 256 else f"<{number}>"


def _text(tokenizer: Any, number: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(number)
    if piece is None:
        return f"<{number}>"
    if "▁" in piece:  # SentencePiece's space, which decoding takes off at a text's beginning
        return piece.replace("▁", " ")
    return tokenizer.decode([number])
