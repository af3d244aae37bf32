"""Rows of instructions and answers, read from a file and checked: nothing here needs torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks import data
from rmoe_megablocks.errors import UsageError

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """``content`` said by ``role``, one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """``messages`` of a conversation; ``where`` it stands, as "alpaca.json: row 3"."""

    where: str
    messages: tuple[Message, ...]


def read(path: Path) -> list[Row]:
    """The rows of a JSON array, or of JSON objects one a line, compressed or not.

    A row has ``instruction``, ``output`` and perhaps ``input`` (Alpaca), or ``messages``: a list of objects with
    ``role`` and ``content``, at least one of them the assistant's.

    Raises:
        UsageError: one line that names the file, the row and the field.
    """
    try:
        with data.open_text(path) as stream:
            text = stream.read().decode("utf-8-sig")
    except data.DataError as error:
        raise UsageError(str(error)) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start:,}: rows are JSON") from None
    if not text.strip():
        raise UsageError(f"{path} is empty")
    rows = [_row(where, value) for where, value in _values(path, text)]
    if not rows:
        raise UsageError(f"{path} has no row")
    return rows


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        for number, value in enumerate(_json(str(path), text), start=1):
            yield f"{path}: row {number}", value
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may have U+2028
        if line.strip():
            yield f"{path}: line {number}", _json(f"{path}: line {number}", line)


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); expected an array, or an object a line") from None


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected an object, got {type(value).__name__}")
    if "messages" in value:
        return Row(where, _messages(where, value["messages"]))
    for name in ("instruction", "output"):
        if name not in value:
            raise UsageError(f"{where}: has no field {name} (expected instruction, input, output; or messages)")
    asked, given = _text(where, value, "instruction"), value.get("input") not in (None, "")
    if given:
        asked = f"{asked}\n{_text(where, value, 'input')}"
    return Row(where, (Message(USER, asked), Message(ASSISTANT, _text(where, value, "output"))))


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: messages is no list of messages")
    found = []
    for number, one in enumerate(value, start=1):
        here = f"{where}, message {number}"
        if not isinstance(one, dict):
            raise UsageError(f"{here}: expected an object, got {type(one).__name__}")
        for name in ("role", "content"):
            if name not in one:
                raise UsageError(f"{here}: has no field {name}")
        if one["role"] not in ROLES:
            raise UsageError(f"{here}: role {one['role']!r}, expected one of {', '.join(ROLES)}")
        found.append(Message(one["role"], _text(here, one, "content")))
    if not any(message.role == ASSISTANT for message in found):
        raise UsageError(f"{where}: messages has none of the assistant: there is nothing to learn")
    return tuple(found)


def _text(where: str, value: dict, name: str) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise UsageError(f"{where}: field {name} is {type(text).__name__}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: field {name} has half of a surrogate pair, which is no text") from None
    return text
