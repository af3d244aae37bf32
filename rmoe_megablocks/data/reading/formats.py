"""What an input holds, told by its content: text, JSON, or something that is refused by name.

The name of a file decides nothing, but a name that contradicts the content is an error: the content is not what
somebody thought it was.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.reading import compression

AUTO, TEXT, BYTES = "auto", "text", "bytes"
INPUT_FORMATS = (AUTO, TEXT, BYTES)
HEAD_BYTES = 1 << 16
UTF8_MARK = codecs.BOM_UTF8

_UTF16 = "is {kind} text, which is not read: convert it (iconv -f {kind} -t UTF-8)"
_ROWS = "convert it to JSON lines, one object a row with its text under a key (--json-key)"
# first bytes, what they begin, what to do about it; longer ones first where one begins with the other
_REFUSED = (
    (codecs.BOM_UTF32_LE, "UTF-32", _UTF16),
    (codecs.BOM_UTF32_BE, "UTF-32", _UTF16),
    (codecs.BOM_UTF16_LE, "UTF-16", _UTF16),
    (codecs.BOM_UTF16_BE, "UTF-16", _UTF16),
    (b"PAR1", "Parquet", _ROWS),
    (b"ARROW1", "Arrow", _ROWS),
    (b"FEA1", "Feather", _ROWS),
    (b"Obj\x01", "Avro", _ROWS),
    (b"SQLite format 3\0", "SQLite", _ROWS),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _ROWS),
    (b"\x93NUMPY", "NumPy", _ROWS),
    (b"PK\x03\x04", "a zip archive", "unpack it first (unzip)"),
    (b"PK\x05\x06", "a zip archive", "unpack it first (unzip)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it first"),
    (b"\x1f\x9d", "compressed data (.Z)", "decompress it first (gzip -d)"),
    (b"\x04\x22\x4d\x18", "lz4 data", "decompress it first (lz4 -d)"),
    (b"LZIP\x01", "lzip data", "decompress it first (lzip -d)"),
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"MMIDIDX\0\0", "an index of Megatron's", "it is tokenized already: train on it with --train-data-path"),
    (b"version https://git-lfs", "a Git LFS pointer", "the file itself is not here: get it (git lfs pull)"),
)
_TAR = (257, b"ustar")
_NAMES = {
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Feather",
    ".avro": "Avro",
    ".orc": "ORC",
    ".zip": "zip",
    ".7z": "7z",
    ".rar": "rar",
    ".tar": "tar",
    ".tgz": "tar",
    ".lz4": "lz4",
    ".npy": "NumPy",
    ".npz": "NumPy",
    ".h5": "HDF5",
    ".pdf": "PDF",
}
_TABLES = (".csv", ".tsv")
_JSON_NAMES = (".json", ".jsonl", ".ndjson", ".jsonlines")
_JSON_OPENING = re.compile(rb'(?:\[\s*)?\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\})', re.DOTALL)
_INSIST = "or take it as the text itself with --input-format text"


def check(path: Path, head: bytes, json_key: str | None, input_format: str) -> None:
    """Refuses a file that does not hold what is asked of it.

    Args:
        head: its first HEAD_BYTES, decompressed.
        json_key: None for plain text.
        input_format: see :func:`rmoe_megablocks.data.prepare`.
    """
    if input_format == BYTES:
        return
    _check_binary(path, head)
    _check_name(path, json_key, input_format)
    content = head.removeprefix(UTF8_MARK)
    if json_key is not None:
        if content.strip() and content.lstrip()[:1] not in (b"{", b"["):
            raise DataError(
                f"{path}: holds plain text (it begins with {_start(content)}), but --json-key {json_key} asks for rows "
                "of JSON: leave --json-key out"
            )
    elif input_format == AUTO and is_json(content):
        keys = _keys(content)
        said = f" (keys: {', '.join(map(repr, keys[:8]))})" if keys else ""
        raise DataError(f"{path}: holds JSON{said}: name the key of the text with --json-key, {_INSIST}")


def is_json(content: bytes) -> bool:
    """Whether text that begins with ``content`` is JSON: an object or an array of objects opens it, or every line is
    JSON by itself (other than a number)."""
    if _JSON_OPENING.match(content.lstrip()):
        return True
    lines = content.splitlines()
    if len(content) >= HEAD_BYTES:
        lines = lines[:-1]  # cut off
    lines = [line for line in lines if line.strip()]
    return bool(lines) and all(map(_is_json_value, lines))


def is_array(content: bytes) -> bool:
    """Whether JSON that begins with ``content`` is one array rather than a value a line."""
    return content.removeprefix(UTF8_MARK).lstrip().startswith(b"[")


class TextCheck:
    """Holds a stream of text against what UTF-8 text is, in order; a character may lie across files."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, path: Path, position: int, data: bytes) -> None:
        """``data`` lies at ``position`` of the text of ``path``. The DataError says where it is no text."""
        if (at := data.find(b"\0")) >= 0:
            raise DataError(
                f"{path}: byte {position + at:,} is 0: binary data, or UTF-16 without its mark; convert it, "
                "or take any bytes as they are with --input-format bytes"
            )
        position -= len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(data)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: byte {max(0, position + error.start):,} is not UTF-8 (0x{error.object[error.start]:02x}): "
                "convert it (iconv -f LATIN1 -t UTF-8), or take any bytes as they are with --input-format bytes"
            ) from None

    def finish(self, path: Path) -> None:
        """At the end of all text, which ``path`` was the last of."""
        if self._decoder.getstate()[0]:
            raise DataError(f"{path}: ends within a character of UTF-8: cut its last bytes off")


def _check_binary(path: Path, head: bytes) -> None:
    if kind := compression.kind_of(head):
        raise DataError(f"{path}: is compressed twice ({kind} inside): decompress it once")
    for magic, kind, advice in _REFUSED:
        if head.startswith(magic):
            what = advice.format(kind=kind)
            said = what if what.startswith("is ") else f"holds {kind}, which is not read: {what}"
            raise DataError(f"{path}: {said}")
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise DataError(f"{path}: is a tar archive, which is not read: unpack it first (tar -xf)")


def _check_name(path: Path, json_key: str | None, input_format: str) -> None:
    """Refuses a name that says something else than the content, which is neither compressed nor binary by now."""
    name = path.name.lower()
    compressed = compression.ENDINGS.get(Path(name).suffix)
    if compressed:
        with open(path, "rb") as stream:
            start = stream.read(16)
        if start and compression.kind_of(start) is None:
            raise DataError(f"{path}: its name says {compressed}, but it begins with {_start(start)}: not compressed")
        name = name[: -len(Path(name).suffix)]
    ending = Path(name).suffix
    if ending in _NAMES:
        raise DataError(f"{path}: its name says {_NAMES[ending]}, but its content is none: rename it if it is text")
    if input_format == AUTO and json_key is None:
        if ending in _TABLES:
            raise DataError(f"{path}: its name says a table: {_ROWS}, {_INSIST}")
        if ending in _JSON_NAMES:
            raise DataError(f"{path}: its name says JSON: name the key of the text with --json-key, {_INSIST}")


def _is_json_value(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list | str)
    except (ValueError, RecursionError):  # text; what nests so deep is no row that could be read either
        return False


def _keys(content: bytes) -> list[str]:
    """The keys of the first object, as far as it is one line."""
    try:
        value = json.loads(content.lstrip().splitlines()[0])
    except (ValueError, RecursionError, IndexError):  # cut off, or on several lines: the message goes without
        return []
    return list(value) if isinstance(value, dict) else []


def _start(content: bytes) -> str:
    return repr(content.lstrip()[:16].decode("utf-8", errors="replace"))
