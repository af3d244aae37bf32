"""Input files, plain text or JSON: read in a stream of pieces, and looked at beforehand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.reading import formats
from rmoe_megablocks.data.reading.compression import check_file, open_text
from rmoe_megablocks.data.reading.rows import read_rows

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """An input file as it was read: ``size`` and ``sha256`` of the file itself, ``text_bytes`` of the text in it."""

    name: str
    size: int
    sha256: str
    text_bytes: int


@dataclass(frozen=True)
class Inputs:
    """What is read, and as what.

    Attributes:
        paths: files, in the order of their text.
        json_key: where a row of JSON has its text; None for plain text.
        input_format: see :func:`rmoe_megablocks.data.prepare`.
    """

    paths: Sequence[Path]
    json_key: str | None
    input_format: str

    def pieces(self) -> Iterator[bytes]:
        """The text: a piece a row, or plain text in pieces of at most CHUNK_BYTES."""
        for path in self.paths:
            yield from self._pieces_of(path)

    def _pieces_of(self, path: Path) -> Iterator[bytes]:
        if self.json_key is not None:
            return read_rows(path, self.json_key)
        return read_chunks(path, drop_mark=self.input_format != formats.BYTES)

    def inspect(self, cuts_bytes: bool, advance: Callable[[int], object]) -> list[Source]:
        """Read all once: checksums, and how much text there is. ``advance`` is told of its bytes as they pass.

        Args:
            cuts_bytes: whether the text may end within a character.

        Raises:
            DataError: no files, or one is missing, unreadable, corrupt, named twice, has no text or is something else.
        """
        self._check_request()
        text_check = formats.TextCheck() if self.json_key is None and self.input_format != formats.BYTES else None
        found = [self._inspect(path, text_check, advance) for path in self.paths]
        if text_check and not cuts_bytes:
            text_check.finish(self.paths[-1])
        return found

    def _check_request(self) -> None:
        if not self.paths:
            raise DataError("no input files")
        if self.input_format not in formats.INPUT_FORMATS:
            raise DataError(f"--input-format {self.input_format}: expected one of {', '.join(formats.INPUT_FORMATS)}")
        if self.json_key is not None and self.input_format != formats.AUTO:
            raise DataError(f"--json-key reads JSON, --input-format {self.input_format} does not: keep one")
        seen: dict[tuple[int, int], Path] = {}
        for path in self.paths:
            check_file(path)
            with _readable(path):
                status = os.stat(path)
            other = seen.setdefault((status.st_dev, status.st_ino), path)
            if other is not path:
                raise DataError(f"{path}: is named twice (as {other}), so that its text would be, too")

    def _inspect(self, path: Path, text_check: formats.TextCheck | None, advance: Callable[[int], object]) -> Source:
        with open_text(path) as stream:
            formats.check(path, stream.read(formats.HEAD_BYTES), self.json_key, self.input_format)
        size = 0
        for piece in self._pieces_of(path):
            if text_check:
                text_check.feed(path, size, piece)
            size += len(piece)
            advance(len(piece))
        if size == 0:
            raise DataError(f"{path}: has no text")
        with _readable(path), open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return Source(path.name, os.fstat(stream.fileno()).st_size, digest, size)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the file that could be read a moment ago, and is gone now."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more ({error.strerror})") from error


def read_chunks(path: Path, drop_mark: bool = True) -> Iterator[bytes]:
    """The text of a plain file in pieces; ``drop_mark`` leaves out the byte-order mark that UTF-8 may begin with."""
    with open_text(path) as stream:
        first = stream.read(len(formats.UTF8_MARK))
        if first and not (drop_mark and first == formats.UTF8_MARK):
            yield first
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
