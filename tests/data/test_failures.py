"""What is wrong is said in one line, and nothing is left that looks like a dataset."""

import errno
import gzip
import os
import signal
import time

import pytest

from rmoe_megablocks.data import DataError, DatasetMetadata, prepare, read_tokens
from rmoe_megablocks.data.build import OutputExists
from rmoe_megablocks.data.prepared import indexed


def content(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("missing.txt", None, "missing.txt: no such file"),
        ("missing.gz", None, "missing.gz: no such file"),
        ("empty.txt", b"", "empty.txt: has no text"),
        ("empty.gz", gzip.compress(b""), "empty.gz: has no text"),
        ("text.gz", b"this is not gzip", "text.gz: its name says gzip, but it begins with 'this is not gzip'"),
        ("cut.gz", gzip.compress(os.urandom(5000))[:-700], "cut.gz: not a complete gzip file"),
        ("bad.gz", gzip.compress(b"a" * 5000)[:-5] + b"12345", "bad.gz: not a complete gzip file"),
        ("bad.xz", b"this is not xz", "bad.xz: its name says xz, but it begins with"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": b}\n', "rows.jsonl:3: not a row of JSON"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "rows.jsonl:2: not a row of JSON"),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl: element 1 of the array: not JSON"),
        ("rows.jsonl", b'{"a":' * 100_000, "rows.jsonl:1: not a row of JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["text"]\n', "rows.jsonl:2: a JSON array, expected an object"),
        ("rows.jsonl", b'{"body": "a"}\n', "rows.jsonl:1: no key 'text' .keys: 'body'.*--json-key"),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text": null}\n',
            "rows.jsonl:2: the value of 'text' is a JSON null, expected",
        ),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', "rows.jsonl:1: .* half a surrogate pair"),
        ("rows.jsonl", b'{"text": ""}\n', "rows.jsonl: has no text"),
        ("rows.jsonl.gz", b"x", "rows.jsonl.gz: its name says gzip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # every process makes other compressed bytes
)
def test_bad_inputs(tmp_path, name, data, says):
    if data is not None:
        write(tmp_path / name, data)
    before = content(tmp_path)
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / name], tmp_path / "out", split="90%,5%,5%", json_key="text" if "rows" in name else None)
    assert "\n" not in str(error.value)
    assert content(tmp_path) == before


def test_other_bad_requests(tmp_path, models):
    text = write(tmp_path / "text", b"some text " * 10)
    rows = write(tmp_path / "rows.jsonl", b'{"text": "the only row, long enough for a share"}')
    no_eos = tmp_path / "no_eos.model"
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"]), model_prefix=str(no_eos)[:-6], vocab_size=9, eos_id=-1, minloglevel=2
    )
    out = tmp_path / "out"
    before = content(tmp_path)

    def fails(says: str, inputs=(text,), **options):
        with pytest.raises(DataError, match=says) as error:
            prepare(inputs, options.pop("output", out), **{"split": "90%,5%,5%", **options})
        assert "\n" not in str(error.value)
        assert content(tmp_path) == before

    fails("no input files", inputs=[])
    fails("is a folder, expected a file", inputs=[tmp_path])
    fails("text: holds plain text .*--json-key text asks for rows", inputs=[rows, text], json_key="text")
    fails("rows.jsonl: its name says JSON", inputs=[text, rows])
    fails("split 'x' is not understood", split="x")
    fails("split '90M,5M,5M' needs 100,000,000 bytes, but the input has 100$", split="90M,5M,5M")
    fails("leaves valid empty: no document falls into it", inputs=[rows], json_key="text")
    fails("unknown tokenizer 'words'", tokenizer="words")
    fails("bytes takes no model", tokenizer_model="some.model")
    fails("needs a model: give one with --tokenizer-model", tokenizer="sentencepiece")
    fails("gone.model: no such file", tokenizer="sentencepiece", tokenizer_model=tmp_path / "gone.model")
    fails("text: not a SentencePiece model", tokenizer="sentencepiece", tokenizer_model=text)
    fails("cannot be read", tokenizer="sentencepiece", tokenizer_model=tmp_path)
    fails("no_eos.model: has no end-of-sentence id", tokenizer="sentencepiece", tokenizer_model=no_eos, append_eod=True)
    fails("output .*text is a file", output=text)
    fails("output .*text/out: .*text is no folder", output=text / "out")
    empty_model = write(tmp_path / "empty.model", b"")
    before = content(tmp_path)
    fails("empty.model: not a SentencePiece model", tokenizer="sentencepiece", tokenizer_model=empty_model)


def test_an_output_that_cannot_be_written_is_noticed_before_the_input_is_read(tmp_path, monkeypatch):
    """By what the system says of the nearest folder: these tests may run as root, who may write anywhere."""
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append((path, mode)))
    monkeypatch.setattr("rmoe_megablocks.data.build.Inputs", None)
    with pytest.raises(DataError, match=f"^output .*: nothing can be written into {tmp_path}$"):
        prepare([tmp_path / "text"], tmp_path / "a" / "b", split="90%,5%,5%")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] and content(tmp_path) == []


def test_existing_output(tmp_path):
    first, second = write(tmp_path / "1", b"first " * 50), write(tmp_path / "2", b"second" * 50)
    out = tmp_path / "out"
    prepare([first], out, split="90%,5%,5%")
    with pytest.raises(OutputExists, match="has a dataset already.*--overwrite"):
        prepare([second], out, split="90%,5%,5%")
    assert bytes(read_tokens(out / "train")[:6].astype("u1")) == b"first "
    prepare([second], out, split="90%,5%,5%", overwrite=True)
    assert bytes(read_tokens(out / "train")[:6].astype("u1")) == b"second"
    assert content(tmp_path) == ["1", "2", "out"]

    # never delete what is not a dataset
    write(out / "notes.txt", b"mine")
    with pytest.raises(OutputExists, match="not a dataset of its own .notes.txt"):
        prepare([first], out, split="90%,5%,5%", overwrite=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    prepare([first], folder, split="90%,5%,5%")  # an empty folder is no obstacle
    (folder / "dataset.json").unlink()
    with pytest.raises(OutputExists, match="no dataset.json"):
        prepare([first], folder, split="90%,5%,5%", overwrite=True)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["SplitWriter.write", "SplitWriter.close"])
def test_interruption_leaves_nothing(tmp_path, monkeypatch, failure, overwrite, where):
    text = write(tmp_path / "text", b"old" * 100)
    out = tmp_path / "out"
    if overwrite:
        prepare([text], out, split="90%,5%,5%")
    text.write_bytes(b"new" * 1_000_000)
    before, metadata = content(tmp_path), DatasetMetadata.load(out) if overwrite else None
    calls = []
    method = where.split(".")[1]
    original = getattr(indexed.SplitWriter, method)

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise failure
        return original(self, *args)

    monkeypatch.setattr(indexed.SplitWriter, method, stop)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else DataError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "cannot be written .No space left"):
        prepare([text], out, split="90%,5%,5%", overwrite=overwrite)
    assert len(calls) == 2
    assert content(tmp_path) == before
    if overwrite:
        assert DatasetMetadata.load(out) == metadata


def test_a_failing_replacement_keeps_the_old_dataset(tmp_path, monkeypatch):
    text = write(tmp_path / "text", b"old" * 100)
    out = tmp_path / "out"
    metadata = prepare([text], out, split="90%,5%,5%")
    rename = os.rename

    def fail(source, target, **options):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DataError, match="cannot be written .Input/output error"):
        prepare([text], out, split="80%,10%,10%", overwrite=True)
    assert content(tmp_path) == ["out", "text"]
    assert DatasetMetadata.load(out) == metadata


def _slow_cli(folder, text):
    """In a child: ``rmoe data prepare`` that is slow enough to be killed in its middle."""
    from tests.data.test_cli import rmoe

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit "ignored"
    original = indexed.SplitWriter.write
    indexed.SplitWriter.write = lambda self, ids: (original(self, ids), time.sleep(1.0))
    os._exit(
        _exit_code(lambda: rmoe("data", "prepare", str(text), "--output", str(folder / "out"), "--split", "1,0,0"))
    )


def _exit_code(function) -> int:
    try:
        return function()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_a_killed_process(tmp_path, processes, number, left):
    text = write(tmp_path / "text", b"0123456789abcdef" * (1 << 20))  # 16 writes of a second each
    (tmp_path / "data").mkdir()
    child = processes.Process(target=_slow_cli, args=(tmp_path / "data", text))
    child.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("data/.out.partial-*/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid, number)
    child.join(20)
    expected = {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    assert child.exitcode == expected[number]
    rest = list((tmp_path / "data").iterdir())
    assert len(rest) == left
    # what kill -9 leaves is hidden, and no dataset
    assert all(path.name.startswith(".out.partial-") and not (path / "dataset.json").exists() for path in rest)


def test_input_that_shrinks_meanwhile(tmp_path, monkeypatch):
    text = write(tmp_path / "text", b"a" * 1000)
    original = indexed.import_megatron
    monkeypatch.setattr(indexed, "import_megatron", lambda: (text.write_bytes(b"a" * 990), original())[1])
    with pytest.raises(DataError, match="changed while it was read: 990 bytes, expected 1,000"):
        prepare([text], tmp_path / "out", split="90%,5%,5%")
    assert content(tmp_path) == ["text"]
