"""Files as they are or compressed with gzip, xz, bzip2 or zstd: told by their first bytes, whatever they are called.

Everything streams. What is damaged, cut short or followed by something else is an error, never a shorter text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from rmoe_megablocks.data.errors import DataError

_MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "xz": rb"\xfd7zXZ\0",
    "lzma": rb"\x5d\0\0",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or one to be skipped in front of it
}
ENDINGS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".xz": "xz",
    ".lzma": "lzma",
    ".bz2": "bzip2",
    ".bz": "bzip2",
    ".zst": "zstd",
    ".zstd": "zstd",
}
_MAGIC_BYTES = 10
_READ_BYTES = 1 << 16


def kind_of(head: bytes) -> str | None:
    """The compression whose files begin as ``head`` does, a key of _MAGIC, or None."""
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL)), None)


def check_file(path: Path) -> None:
    """Raises a DataError unless ``path`` is a file that can be read twice. Opens nothing: a pipe would wait."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        stdin = ": standard input is not read, as a text is read twice; give a file" if str(path) == "-" else ""
        raise DataError(f"{path}: no such file{stdin}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: is a folder, expected a file")
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise DataError(f"{path}: is {kind}, and a text is read twice: write it into a file first")


@contextmanager
def open_text(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its content is compressed.

    Raises:
        DataError: also for what goes wrong while the caller reads from it, such as a truncated gzip file.
    """
    path = Path(path)
    kind = None
    try:
        check_file(path)
        with open(path, "rb") as file:
            kind = kind_of(file.read(_MAGIC_BYTES))
            file.seek(0)
            with _decompressed(path, file, kind) as stream:
                yield stream
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, _Damaged) as error:
        raise DataError(f"{path}: not a complete {kind} file ({_one_line(error)})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error


def _decompressed(path: Path, file: BinaryIO, kind: str | None) -> BinaryIO:
    if kind is None:
        return file
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    if kind == "zstd":
        zstd = _zstd(path)
        reader = _Streams(file, zstd.ZstdDecompressor, zstd.ZstdError)
    elif kind == "bzip2":
        reader = _Streams(file, bz2.BZ2Decompressor, OSError)
    else:
        reader = _Streams(file, lzma.LZMADecompressor, lzma.LZMAError)
    return io.BufferedReader(reader, _READ_BYTES)


def _zstd(path: Path) -> ModuleType:
    """Python's own module, from 3.14 on, or the same for older ones."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise DataError(
                f"{path}: is compressed with zstd: install what reads it (pip install backports.zstd), "
                f"or decompress it first (zstd -d {path.name})"
            ) from None
    return zstd


class _Damaged(Exception):
    """A decompressor does not take what it is given."""


class _Streams(io.RawIOBase):
    """Compressed streams one after another, read as one.

    The standard library's own files end without a word where something follows the first stream that is none; it may
    have been a stream, and its text would be missing. Zero bytes that pad a stream are left out.

    Args:
        file: at the start of the first stream.
        decompressor: makes a decompressor for one stream, with the interface of bz2.BZ2Decompressor.
        error: what that raises for damage.
    """

    def __init__(self, file: BinaryIO, decompressor: Callable[[], object], error: type[Exception]) -> None:
        self._file = file
        self._new = decompressor
        self._error = error
        self._decompressor = decompressor()
        self._follows = False  # whether what is read now comes after a complete stream, and has not given anything yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._next_stream()
                if not data:
                    return 0
            elif self._decompressor.needs_input:
                data = self._file.read(_READ_BYTES)
                if not data:
                    raise EOFError("it ends before its end marker")
            try:
                out = self._decompressor.decompress(data, len(buffer))
            except self._error as error:
                text = "something else follows its end" if self._follows else _one_line(error)
                raise _Damaged(text) from error
            if out:
                self._follows = False
                buffer[: len(out)] = out
                return len(out)

    def _next_stream(self) -> bytes:
        """The first bytes of the stream after the one that ended, for a decompressor of its own; none at the end."""
        rest = self._decompressor.unused_data
        while not (rest := rest.lstrip(b"\0")):
            rest = self._file.read(_READ_BYTES)
            if not rest:
                return b""
        self._decompressor, self._follows = self._new(), True
        return rest


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
