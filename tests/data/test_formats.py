"""What an input is, is told by its content; what is not read is refused by name, and nothing else becomes tokens."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile

import pytest

from rmoe_megablocks.data import DataError, open_text, prepare, read_tokens
from rmoe_megablocks.data.reading.rows import read_rows

TEXT = "Zeile eins, naïve\r\nline two 日本語\n".encode() * 40
ROWS = [{"id": number, "text": f"row {number} é\n"} for number in range(60)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def tokens(folder) -> bytes:
    return read_tokens(folder / "train").astype("u1").tobytes()


def prepared(tmp_path, name: str, content: bytes, **options) -> bytes:
    (tmp_path / name).write_bytes(content)
    prepare([tmp_path / name], tmp_path / "out", split="100%,0,0", overwrite=True, **options)
    return tokens(tmp_path / "out")


def refusal(tmp_path, name: str, content: bytes, **options) -> str:
    (tmp_path / name).write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError) as error:
        prepare([tmp_path / name], tmp_path / "refused", split="100%,0,0", **options)
    assert sorted(os.listdir(tmp_path)) == before
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{tmp_path / name}: ")
    return text.removeprefix(f"{tmp_path / name}: ")


def zstd():
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    return zstd


COMPRESSORS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": lambda data: zstd().compress(data),
}


@pytest.mark.parametrize("name", ["text", "text.TXT", "text.JSONL.GZ", "text.Zst"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compression_is_told_by_content(tmp_path, kind, name):
    compress = COMPRESSORS[kind]
    if "JSON" not in name:
        assert prepared(tmp_path, name, compress(TEXT)) == TEXT
    assert prepared(tmp_path, name, compress(LINES), json_key="text").decode() == "".join(row["text"] for row in ROWS)


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2", "zstd"])
def test_several_streams_and_what_damages_them(tmp_path, kind):
    compress = COMPRESSORS[kind]
    parts = [b"one " * 300, b"", b"two " * 70_000]
    path = tmp_path / "text"
    path.write_bytes(b"".join(map(compress, parts)))
    with open_text(path) as stream:
        assert stream.read() == b"".join(parts)
    assert f"not a complete {kind} file" in refusal(tmp_path, "cut", compress(TEXT)[:-5])
    assert f"not a complete {kind} file" in refusal(tmp_path, "cut", compress(TEXT) + compress(TEXT)[:-9])
    assert f"not a complete {kind} file" in refusal(tmp_path, "more", compress(TEXT) + b"this is something else")
    damaged = bytearray(compress(os.urandom(5000)))
    damaged[2500] ^= 0xFF
    if kind != "zstd":  # whose checksum is optional
        assert f"not a complete {kind} file" in refusal(tmp_path, "bad", bytes(damaged))


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_padding_after_a_stream_is_no_damage(tmp_path, kind):
    assert prepared(tmp_path, "text", COMPRESSORS[kind](TEXT) + bytes(1024)) == TEXT


def test_zstd_without_its_library(tmp_path, monkeypatch):
    for module in ("compression", "compression.zstd", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    said = refusal(tmp_path, "text.zst", b"\x28\xb5\x2f\xfd and so on")
    assert said.startswith("is compressed with zstd: install what reads it (pip install backports.zstd)")


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("text", TEXT)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            file.addfile(tarfile.TarInfo("text"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1\x15\x04\x15", "holds Parquet, which is not read: convert it to JSON lines"),
        (b"ARROW1\0\0\xff\xff\xff\xff", "holds Arrow, which is not read: convert"),
        (archive("zip"), "holds a zip archive, which is not read: unpack it first"),
        (archive("w"), "is a tar archive, which is not read: unpack it first"),
        (archive("w:gz"), "is a tar archive, which is not read: unpack it first"),
        (gzip.compress(bz2.compress(TEXT)), "is compressed twice .bzip2 inside"),
        ("text".encode("utf-16"), "is UTF-16 text, which is not read: convert it .iconv -f UTF-16 -t UTF-8"),
        ("\ufefftext".encode("utf-16-be"), "is UTF-16 text"),
        ("text".encode("utf-32"), "is UTF-32 text"),
        ("some text".encode("utf-16-le"), "byte 1 is 0: binary data, or UTF-16 without its mark"),
        (gzip.compress("text".encode("utf-16")), "is UTF-16 text"),
        ("naïve".encode("latin-1"), "byte 2 is not UTF-8 .0xef.: convert it .iconv -f LATIN1"),
        (b"x" * (1 << 20) + b"ab\xe6\x97\x41", "byte 1,048,578 is not UTF-8 .0xe6."),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer, .*git lfs pull"),
        (b"MMIDIDX\0\0\1", "holds an index of Megatron's"),
        (b"", "has no text"),
        (b"\xef\xbb\xbf", "has no text"),
    ],
)
def test_no_text(tmp_path, content, says):
    for name in ("corpus.txt", "corpus"):
        assert re.search(says, refusal(tmp_path, name, content))


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.ZIP", "a.tar", "a.csv", "a.tsv.gz", "a.gz", "a.json", "a.JSONL", "a.ndjson"]
)
def test_a_name_that_contradicts_the_content(tmp_path, name):
    content = gzip.compress(TEXT) if name == "a.tsv.gz" else TEXT
    assert "its name says" in refusal(tmp_path, name, content)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        b"\n  " + LINES,
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b'{\n  "data": [1, 2]\n}\n',
        b'"one"\n"two"\n',
        b'["one"]\n["two"]\n',
        b'{"text": "' + b"x" * 200_000 + b'"}\n',
    ],
)
def test_json_needs_a_key(tmp_path, content):
    said = refusal(tmp_path, "corpus", content)
    assert said.startswith("holds JSON") and "name the key of the text with --json-key" in said
    # who wants it gets the syntax as text
    assert prepared(tmp_path, "corpus", content, input_format="text") == content.removeprefix(b"\xef\xbb\xbf")


def test_keys_are_named(tmp_path):
    assert "holds JSON (keys: 'id', 'text')" in refusal(tmp_path, "corpus", LINES)


@pytest.mark.parametrize(
    "content", [b"{{Infobox}} a wiki page\n", b"[1] a note\n", b"1\n2\n3\n", b'"Well," she said.\n', b"{x: 1}\n"]
)
def test_text_that_is_no_json(tmp_path, content):
    assert prepared(tmp_path, "corpus", content) == content
    with pytest.raises(DataError, match="corpus(:1)?: "):
        prepare([tmp_path / "corpus"], tmp_path / "refused", split="100%,0,0", json_key="text")


def test_a_key_is_for_json(tmp_path):
    said = refusal(tmp_path, "rows.jsonl", TEXT, json_key="text")
    assert said.startswith("holds plain text (it begins with 'Zeile eins") and "leave --json-key out" in said


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 18])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_arrays(tmp_path, monkeypatch, chunk, mark):
    monkeypatch.setattr("rmoe_megablocks.data.reading.rows._CHUNK_BYTES", chunk)
    rows = [{"text": 'a "quoted" \\ [one], 日本語 \n', "n": [1.5e-7, -12, True, None, {"text": "no"}]}, *ROWS[:3]]
    rows.append({"x": "y" * 999, "text": "end"})
    for spelled in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False), json.dumps(rows) + "\n\n"):
        (tmp_path / "rows").write_bytes(mark + spelled.encode())
        assert list(read_rows(tmp_path / "rows", "text")) == [row["text"].encode() for row in rows]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"text": "a"}', "']' expected after|',' expected after .*element 1 .*found the end"),
        (b'[{"text": "a"} {"text": "b"}]', "',' expected after .*element 1 .*found '{'"),
        (b'[{"text": "a"},]', "element 2 of the array: not JSON"),
        (b'[{"text": "a"}, {"text": "b', "element 2 of the array: not JSON .Unterminated string"),
        (b'[{"text": "a"}, {"text": tru' + b" " * 99, "element 2 of the array: not JSON"),
        (b'[{"text": "a"}]\n{"text": "b"}', "more text after the end of the array"),
        (b'[{"text": "a"}, "b"]', "element 2 of the array: a JSON string, expected an object"),
        (b'[{"text": "a"}, {"body": "b"}]', "element 2 of the array: no key 'text' .keys: 'body'"),
        (b'[{"text": 5}]', "element 1 of the array: the value of 'text' is a JSON number, expected a string"),
        (b'[{"text": "a", "text": "b"}]', "element 1 of the array: not JSON .the key 'text' is there twice"),
        (b'{"text": "a", "text": "b"}', ":1: not a row of JSON .the key 'text' is there twice"),
        (b'[{"text": "\xff"}]', "not UTF-8"),
        (b"[]", "has no text"),
        (b'{\n"text": "a"\n}', ":1: not a row of JSON .*an object has to be one line"),
        (b'{"text": "a"}{"text": "b"}', ":1: not a row of JSON .Extra data"),
    ],
)
def test_wrong_rows(tmp_path, content, says):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / "rows"], tmp_path / "out", split="100%,0,0", json_key="text")
    assert "\n" not in str(error.value)


def test_a_broken_array_is_not_read_to_its_end(tmp_path):
    (tmp_path / "rows").write_bytes(b'[{"text": "a"}, {"text": nothing}, ' + b'{"text": "b"}, ' * 400_000)
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="element 2 of the array: not JSON"):
            list(read_rows(tmp_path / "rows", "text"))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_marks_and_shards(tmp_path):
    # split -b cuts characters apart: they meet again
    text = "日本語".encode() * 100
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text[:100])
    (tmp_path / "b").write_bytes(text[100:])
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", split="100%,0,0")
    assert tokens(tmp_path / "out") == text
    with pytest.raises(DataError, match="b: byte 0 is not UTF-8"):
        prepare([tmp_path / "b"], tmp_path / "out2", split="100%,0,0")


def test_text_that_ends_within_a_character(tmp_path, models):
    text = "日本語".encode()[:-1]  # as head -c leaves it
    assert prepared(tmp_path, "a", text) == text
    said = refusal(tmp_path, "b", text, tokenizer="sentencepiece", tokenizer_model=models["exact"])
    assert said == "ends within a character of UTF-8: cut its last bytes off"


def test_any_bytes(tmp_path, models):
    content = b"\xef\xbb\xbf\0\xffPAR1"
    assert prepared(tmp_path, "a.parquet", content, input_format="bytes") == content
    assert prepared(tmp_path, "a", gzip.compress(content), input_format="bytes") == content
    for options, says in (
        (
            dict(tokenizer="sentencepiece", tokenizer_model=models["exact"]),
            "--input-format bytes needs --tokenizer bytes",
        ),
        (dict(json_key="text"), "--json-key reads JSON, --input-format bytes does not"),
    ):
        with pytest.raises(DataError, match=says):
            prepare([tmp_path / "a"], tmp_path / "out3", split="1,0,0", input_format="bytes", **options)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(TEXT)
    (tmp_path / "link").symlink_to("a")
    for inputs, says in (
        (["pipe"], "pipe: is a pipe, and a text is read twice: write it into a file first"),
        (["/dev/null"], "/dev/null: is a device or socket"),
        (["-"], "-: no such file|-: .*standard input is not read"),
        (["a", "link"], "link: is named twice .as .*a., so that its text would be, too"),
    ):
        with pytest.raises(DataError, match=says):
            prepare([tmp_path / name for name in inputs], tmp_path / "out", split="100%,0,0")
