"""Rows of files, and the one line about those that are none."""

import gzip
import json

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.finetuning.rows import Message, read

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("form", ["array", "lines", "gzip"])
def test_alpaca(tmp_path, form):
    rows = [ALPACA, {"instruction": "Say.", "output": "x\u2028y"}, ALPACA | {"input": ""}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if form == "lines" else json.dumps(rows)
    path = tmp_path / "rows"
    path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else b"\xef\xbb\xbf" + text.encode())
    asked = [row.messages for row in read(path)]
    assert asked == [
        (Message("user", "Add.\n1 2"), Message("assistant", "3")),
        (Message("user", "Say."), Message("assistant", "x\u2028y")),
        (Message("user", "Add."), Message("assistant", "3")),
    ]


def test_messages(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [*CHAT["messages"], ANSWER]}))
    (row,) = read(path)
    assert row.messages == (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "rows is empty"),
        ("[]", "rows has no row"),
        ("[1]", "rows: row 1: expected an object, got int"),
        ("{", "rows: line 1 is not JSON"),
        ("[{]", "rows is not JSON"),
        (json.dumps([ALPACA, {"instruction": "x"}]), "rows: row 2: has no field output"),
        (json.dumps(ALPACA) + '\n{"output": "x"}', "rows: line 2: has no field instruction"),
        (json.dumps(ALPACA | {"output": 3}), "rows: line 1: field output is int"),
        (json.dumps(ALPACA | {"input": ["x"]}), "rows: line 1: field input is list"),
        (json.dumps(ALPACA | {"output": "\ud800"}), "rows: line 1: field output has half of a surrogate pair"),
        (json.dumps(CHAT), "rows: line 1: messages has none of the assistant"),
        ('{"messages": []}', "rows: line 1: messages is no list"),
        ('{"messages": [{"role": "user"}]}', "rows: line 1, message 1: has no field content"),
        ('{"messages": [{"content": "x"}]}', "rows: line 1, message 1: has no field role"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "rows: line 1, message 1: role 'tool'"),
    ],
    ids=range(15),
)
def test_what_is_no_row(tmp_path, text, expected):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(UsageError) as raised:
        read(tmp_path / "rows")
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_not_utf8(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UsageError, match="not UTF-8 at byte 7"):
        read(tmp_path / "rows")
