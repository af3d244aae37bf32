"""Input files: plain text and JSON lines, each also compressed with gzip or xz.

A name that ends in .jsonl, .jsonl.gz or .jsonl.xz is JSON lines, one document a row; every other name is plain text.
Everything here streams: no more than a chunk, or a row, is in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rmoe_megablocks.data.errors import DataError

CHUNK_BYTES = 1 << 20

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Source:
    """An input file as it was read: ``size`` and ``sha256`` of the file itself, ``text_bytes`` of the text in it."""

    name: str
    size: int
    sha256: str
    text_bytes: int


def is_jsonl(path: Path) -> bool:
    """Whether ``path`` is JSON lines by its name."""
    return (path.stem if path.suffix in _OPENERS else path.name).endswith(".jsonl")


@contextmanager
def open_text(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a text file, decompressed when its name ends in .gz or .xz.

    Raises:
        DataError: also for what goes wrong while the caller reads from it, such as a truncated gzip file.
    """
    path = Path(path)
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: not a complete {path.suffix} file ({_one_line(error)})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """The text of a plain file in pieces of at most ``CHUNK_BYTES``."""
    with open_text(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def read_rows(path: Path, key: str) -> Iterator[bytes]:
    """The UTF-8 text under ``key`` of each row of a JSON lines file; empty lines are skipped.

    Raises:
        DataError: names the file and the line of a row that is no JSON object or has no text under ``key``.
    """
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a row of JSON ({_one_line(error)})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a JSON {type(row).__name__}, expected an object with the key {key!r}")
            if key not in row:
                present = ", ".join(map(repr, list(row)[:8])) or "none"
                raise DataError(f"{where}: no key {key!r} (keys: {present}); choose one with --json-key")
            if not isinstance(row[key], str):
                raise DataError(f"{where}: the value of {key!r} is a {type(row[key]).__name__}, expected text")
            try:
                yield row[key].encode()
            except UnicodeEncodeError:
                raise DataError(f"{where}: the value of {key!r} has half a surrogate pair") from None


def inspect(path: Path, key: str, advance: Callable[[int], object]) -> Source:
    """Read a file once: its checksum and how much text it has. ``advance`` is told of the bytes of text as they pass.

    Raises:
        DataError: the file is missing, unreadable, corrupt, or has no text.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected a file")
    size = 0
    for piece in read_rows(path, key) if is_jsonl(path) else read_chunks(path):
        size += len(piece)
        advance(len(piece))
    if size == 0:
        raise DataError(f"{path}: has no text")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Source(path.name, path.stat().st_size, digest, size)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
