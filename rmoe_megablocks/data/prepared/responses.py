"""Which tokens of a row a model is to learn: those behind a line that says where the response begins.

Beside a split's tokens lies SPLIT.mask, a byte a token: 1 for one that is predicted, 0 for one of the prompt.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared.indexed import read_index
from rmoe_megablocks.data.tokenizers import SentencePieceTokenizer, Tokenizer

SUFFIX = ".mask"


def mask_path(prefix: str | Path) -> Path:
    """SPLIT.mask of the split PREFIX."""
    return Path(f"{prefix}{SUFFIX}")


def encode(tokenizer: Tokenizer, row: bytes, line: str, number: int) -> tuple[np.ndarray, int]:
    """The ids (1-D) of a row, and how many of them are the prompt: all to the end of the line that is ``line``.

    Both parts are encoded by themselves, the second one as what follows a line: no token reaches over the end of the
    prompt.

    Raises:
        DataError: row ``number``, without counting empty ones, has no such line, or several, of which nobody knows
            which one begins the response.
    """
    places = [match.end() for match in re.finditer(rb"^" + re.escape(line.encode()) + rb"\n", row, re.MULTILINE)]
    if len(places) != 1:
        found = f"{len(places)} times" if places else "nowhere"
        begins = row[:40].decode(errors="replace")
        raise DataError(
            f"--loss-after: row {number}, which begins {begins!r}, has the line {line!r} {found}, expected once"
        )
    cut = places[0]
    parts = [row[:cut], row[cut:]]
    if isinstance(tokenizer, SentencePieceTokenizer):
        ids = [
            tokenizer.encode_pieces([part.decode()], at_start=not order)
            for order, part in enumerate(parts)
            if part  # an empty response has no token of its own
        ]
    else:
        ids = [np.frombuffer(part, np.uint8) for part in parts]
    return np.concatenate(ids), len(ids[0])


class Masks:
    """Reads SPLIT.mask as an indexed dataset reads tokens: ``get(document, offset, length)``."""

    def __init__(self, prefix: str | Path) -> None:
        """Raises DataError unless there is a byte for each token of the split PREFIX."""
        lengths = read_index(prefix).lengths.astype(np.int64)
        path = mask_path(prefix)
        size = path.stat().st_size
        if size != lengths.sum():
            raise DataError(f"{path}: {size:,} bytes, but the index says {lengths.sum():,} tokens")
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        self._mask = np.memmap(path, np.uint8, mode="r")

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """1 or 0 of each token, uint8: of document ``idx`` from ``offset`` on."""
        start, end = self._starts[idx] + offset, self._starts[idx + 1]
        return self._mask[start : end if length is None else start + length]
