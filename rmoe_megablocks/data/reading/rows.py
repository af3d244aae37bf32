"""JSON: the texts under a key of objects that come one a line, or as the elements of one array.

No more than a row, or a chunk of an array, is in memory.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.reading import formats
from rmoe_megablocks.data.reading.compression import open_text

_CHUNK_BYTES = 1 << 18
_WHITE_SPACE = " \t\r\n"
# an error as near as this to the end of what was read may come from a value that goes on (-Infinity has 9 letters)
_CUT_CHARACTERS = 12


def read_rows(path: Path, key: str) -> Iterator[bytes]:
    """The UTF-8 text under ``key`` of each object, in order; empty lines are skipped.

    Raises:
        DataError: names the file and the line, or the element of an array, that is no JSON object or has no text.
    """
    with open_text(path) as stream:
        array = formats.is_array(stream.read(formats.HEAD_BYTES))
    with open_text(path) as stream:
        values = _elements(path, stream, _object_of(key)) if array else _lines(path, stream, _object_of(key))
        for where, value in values:
            yield _text(where, value, key)


def _lines(path: Path, stream: BinaryIO, hook: Callable) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line, object_pairs_hook=hook)
        except (ValueError, RecursionError) as error:
            hint = "; an object has to be one line" if number == 1 and line.strip() in (b"{", b"[{") else ""
            raise DataError(f"{where}: not a row of JSON ({_one_line(error)}){hint}") from None


def _elements(path: Path, stream: BinaryIO, hook: Callable) -> Iterator[tuple[str, object]]:
    """(where, value) of the elements of the array that ``stream`` holds."""
    source = _Characters(path, stream)
    decoder = json.JSONDecoder(object_pairs_hook=hook)
    source.expect("[", "the array")
    number = 0
    while source.peek() != "]" or number:
        number += 1
        where = f"{path}: element {number} of the array"
        yield where, _element(source, decoder, where)
        if source.peek() == "]":
            break
        source.expect(",", where)
    source.expect("]", "the array")
    if source.peek():
        raise DataError(f"{path}: more text after the end of the array")


def _element(source: _Characters, decoder: json.JSONDecoder, where: str) -> object:
    while True:
        source.peek()
        try:
            value, source.position = decoder.raw_decode(source.text, source.position)
            return value
        except json.JSONDecodeError as error:
            cut = error.pos >= len(source.text) - _CUT_CHARACTERS or error.msg.startswith("Unterminated string")
            if cut and source.more():
                continue
            raise DataError(f"{where}: not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({_one_line(error)})") from None


class _Characters:
    """The text of a stream from a position on; reads twice as much each time it does not suffice."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.text, self.position = "", 0
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._at_end = False

    def more(self) -> bool:
        """Reads on; whether there was more. What is before the position is dropped."""
        if self._at_end:
            return False
        self.text, self.position = self.text[self.position :], 0
        data = self._stream.read(max(_CHUNK_BYTES, 2 * len(self.text)))
        self._at_end = not data
        try:
            self.text += self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8 ({error.reason})") from None
        return not self._at_end

    def peek(self) -> str:
        """The next character that is no white space, which becomes the position; empty at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _WHITE_SPACE:
                self.position += 1
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]

    def expect(self, character: str, where: str) -> None:
        """Steps over ``character``, which has to come next."""
        found = self.peek()
        if found != character:
            what = repr(found) if found else "the end of the file"
            raise DataError(f"{self._path}: {character!r} expected after {where}, found {what}")
        self.position += 1


def _object_of(key: str) -> Callable[[list[tuple[str, object]]], dict]:
    """What makes an object of its pairs: of two texts under ``key``, neither is silently dropped."""

    def pairs_to_dict(pairs: list[tuple[str, object]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs) and sum(name == key for name, _ in pairs) > 1:
            raise ValueError(f"the key {key!r} is there twice")
        return row

    return pairs_to_dict


def _text(where: str, row: object, key: str) -> bytes:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {_json_type(row)}, expected an object with the key {key!r}")
    if key not in row:
        present = ", ".join(map(repr, list(row)[:8])) or "none"
        raise DataError(f"{where}: no key {key!r} (keys: {present}); choose one with --json-key")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: the value of {key!r} is a JSON {_json_type(row[key])}, expected a string")
    try:
        return row[key].encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the value of {key!r} has half a surrogate pair") from None


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
