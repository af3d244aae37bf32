"""Odd texts for ``rmoe data prepare``, and odd datasets for training."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np

from rmoe_megablocks import data
from rmoe_megablocks.data.prepared.indexed import SplitWriter
from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SMALL, trained, would_start

PREPARE = "rmoe data prepare --output out --split 80%,10%,10%"
WEIGHED = "rmoe data prepare a --output out --split"
TRAIN = (
    f"pretrain --config {{repository}}/configs/tiny.yaml {SMALL} --pipeline-model-parallel-size 1 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --eval-iters 1 "
    "--eval-interval 1 --log-interval 1"
)
NULL = "--tokenizer-type NullTokenizer --vocab-size 256"
TEXT = "A line of text, naïve.\n" * 400
ROWS = [{"id": number, "text": f"row {number} of the text\n"} for number in range(400)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def holds(text: str):
    """The dataset in out/ is these bytes."""

    def check(outcome):
        found = [data.read_tokens(outcome.folder / "out" / split) for split in ("train", "valid", "test")]
        assert np.concatenate(found).astype(np.uint8).tobytes() == text.encode()

    return check


ROW_TEXT = "".join(row["text"] for row in ROWS)


def prepare(name: str, content, refused=None, works=None, options: str = "") -> Case:
    title = f"rmoe data prepare {options} {name}".replace("  ", " ")
    return Case(title, f"{PREPARE} {options} {name}", refused, works, files={name: content})


def plain(folder: Path) -> None:
    """Indexed datasets without a dataset.json: ids up to 255, up to 256, one document, and a short one."""
    rng = np.random.default_rng(0)
    for name, ids in {
        "good": rng.integers(0, 256, 900),
        "beyond": np.arange(257).repeat(4),
        "short": rng.integers(0, 256, 20),
    }.items():
        writer = SplitWriter(folder / name, 256)
        writer.write(ids)
        writer.close()
    (folder / "list").write_text("1e-1 good 1 good")


def ready(split: str, **options):
    """Makes the prepared dataset ready/."""

    def make(folder: Path) -> None:
        (folder / "text").write_text(TEXT)
        data.prepare([folder / "text"], folder / "ready", split=split, **options)

    return make


def without_evaluation_of(*splits: str):
    def check(outcome):
        trained(outcome)
        text = outcome.out + outcome.err
        (summary,) = outcome.folder.rglob("summary.json")
        for split in ("valid", "test"):
            assert text.count(f"evaluation of {split} is left out") == (split in splits), text
            assert (f"{split}_bpc" in json.loads(summary.read_text())) == (split not in splits and "ready" in text)

    return check


def short_test(outcome):
    """It is evaluated exactly, though not by Megatron."""
    trained(outcome)
    assert "evaluation of test is left out during training" in outcome.out + outcome.err
    (summary,) = outcome.folder.rglob("summary.json")
    summary = json.loads(summary.read_text())
    assert 4 < summary["test_bpc"] < 20 and 4 < summary["valid_bpc"] < 10


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


CASES = [
    # what a file is
    prepare("x.json", LINES, "x.json: its name says JSON.*--json-key"),
    prepare("x.JSONL", LINES, "x.JSONL: its name says JSON.*--json-key"),
    prepare("x.txt", LINES, r"x.txt: holds JSON \(keys: 'id', 'text'\).*--json-key"),
    prepare("x", json.dumps(ROWS), "x: holds JSON.*--json-key"),
    prepare("rows.txt", LINES, works=holds(LINES), options="--input-format text"),
    prepare("rows.txt", LINES, works=holds(ROW_TEXT), options="--json-key text"),
    prepare("x.JSONL.GZ", gzip.compress(LINES.encode()), works=holds(ROW_TEXT), options="--json-key text"),
    prepare("x.json", json.dumps(ROWS, indent=1), works=holds(ROW_TEXT), options="--json-key text"),
    prepare("x.txt", TEXT, "x.txt: holds plain text.*leave --json-key out", options="--json-key text"),
    prepare("x.bz2", bz2.compress(TEXT.encode()), works=holds(TEXT)),
    prepare("misnamed.gz", lzma.compress(TEXT.encode()), works=holds(TEXT)),
    prepare("no-ending", gzip.compress(TEXT.encode()) * 2, works=holds(TEXT * 2)),
    prepare("marked.txt", b"\xef\xbb\xbf" + TEXT.encode(), works=holds(TEXT)),
    prepare("windows.txt", TEXT.replace("\n", "\r\n"), works=holds(TEXT.replace("\n", "\r\n"))),
    prepare("x.parquet", b"PAR1\x15\0\x15\0", "x.parquet: holds Parquet.*JSON lines"),
    prepare("x.zip", b"PK\x03\x04\x14\0\0", "x.zip: holds a zip archive.*unpack"),
    prepare("utf16.txt", TEXT.encode("utf-16"), "utf16.txt: is UTF-16 text.*iconv"),
    prepare("latin.txt", TEXT.encode("latin-1"), "latin.txt: byte 18 is not UTF-8.*iconv"),
    prepare("program", b"\x7fELF\2\1\1\0\0", "program: byte 7 is 0: binary data"),
    prepare("cut.gz", gzip.compress(TEXT.encode())[:-9], "cut.gz: not a complete gzip file"),
    prepare("more.xz", lzma.compress(TEXT.encode()) + b"garbage garbage", "more.xz: not a complete xz file"),
    prepare("page.gz", "<html>404", "page.gz: its name says gzip.*begins with '<html>404'"),
    prepare("x.csv", "a,b\n1,2\n", "x.csv: its name says a table"),
    prepare("lfs.txt", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
    prepare("empty.txt", "", "empty.txt: has no text"),
    prepare("folder", None, "folder: is a folder"),
    Case("text from a pipe", f"{PREPARE} pipe", files=pipe, refused="pipe: is a pipe.*write it into a file"),
    Case("text from standard input", f"{PREPARE} -", refused="-: no such file: standard input is not read"),
    Case("a text twice", f"{PREPARE} a.txt ./a.txt", files={"a.txt": TEXT}, refused="a.txt: is named twice"),
    # rows
    prepare("null.jsonl", '{"text": "a"}\n{"text": null}\n', "null.jsonl:2:.*JSON null", options="--json-key text"),
    prepare("key.jsonl", '{"body": "a"}\n', "key.jsonl:1: no key 'text'.*'body'", options="--json-key text"),
    prepare("twice.jsonl", '{"text": "a", "text": "b"}\n', ":1:.*'text' is there twice", options="--json-key text"),
    prepare("pretty.json", '{\n "text": "a"\n}\n', "pretty.json:1:.*has to be one line", options="--json-key text"),
    prepare("cut.json", json.dumps(ROWS)[:-20], "element 400 of the array: not JSON", options="--json-key text"),
    # splits, tokenizers
    Case("a split of weights", f"{WEIGHED} 8,1,1", files={"a": TEXT}, refused="10 bytes of 9,600"),
    Case("a split above 100 %", f"{WEIGHED} 90%,9%,2%", files={"a": TEXT}, refused="sums to 1.01"),
    Case(
        "a tokenizer model that is JSON",
        f"{PREPARE} --tokenizer sentencepiece --tokenizer-model tokenizer.json a",
        files={"a": TEXT, "tokenizer.json": '{"version": "1.0"}'},
        refused="tokenizer.json: not a SentencePiece model",
    ),
    Case("an output that is not ours", f"{PREPARE} a --overwrite", files={"a": "", "out/b": ""}, refused="output out"),
    # training
    Case(
        "token id 256 with --vocab-size 256",
        f"{TRAIN} --train-data-path beyond {NULL}",
        files=plain,
        refused="--train-data-path beyond: holds the token id 256, the vocabulary has 256",
    ),
    Case(
        "token id 256 with tensor parallelism",
        f"{TRAIN} --train-data-path beyond {NULL} --tensor-model-parallel-size 2 --sequence-parallel",
        files=plain,
        refused="--train-data-path beyond: holds the token id 256",
    ),
    Case("weights as 1e-1", f"{TRAIN} --train-data-path 1e-1 good 9e-1 good {NULL}", files=plain, works=would_start),
    Case("weights in a file", f"{TRAIN} --data-args-path list --split 1,0,0 {NULL}", files=plain, works=would_start),
    Case("a weight of 0", f"{TRAIN} --train-data-path 0 good 1 good {NULL}", files=plain, refused="weight 0 of good"),
    Case("a weight too few", f"{TRAIN} --data-path 1 good good {NULL}", files=plain, refused="1 is taken for"),
    Case("data without a tokenizer", f"{TRAIN} --train-data-path good", files=plain, refused="needs --tokenizer-type"),
    Case("a prefix with its ending", f"{TRAIN} --data-path good.bin {NULL}", files=plain, refused="without its .bin"),
    Case("a short text", f"{TRAIN} --train-data-path short {NULL}", files=plain, refused="short: has 20 tokens"),
    Case("validation alone", f"{TRAIN} --valid-data-path good {NULL}", files=plain, refused="without --train"),
    Case("an odd --split", f"{TRAIN} --data-path good {NULL} --split 1e-1,1,1", files=plain, refused="--split 1e-1"),
    Case("data named twice", f"{TRAIN} --data-path good --dataset x {NULL}", files=plain, refused="both name the data"),
    Case("--fim-data", f"{TRAIN} --fim-data", refused="--fim-data has no effect"),
    Case(
        "--split of a prepared dataset",
        f"{TRAIN} --dataset ready --split 9,1,0",
        files=ready("80%,10%,10%"),
        refused="--split 9,1,0.*leave it out",
    ),
    Case(
        "masks at ends of documents that are not there",
        f"{TRAIN} --dataset ready --reset-position-ids",
        files=ready("80%,10%,10%"),
        refused="--reset-position-ids.*--append-eod",
    ),
    Case(
        "a dataset without validation and test",
        f"{TRAIN} --dataset ready",
        files=ready("100%,0,0"),
        trains=True,
        works=without_evaluation_of("valid", "test"),
        seconds=120,
    ),
    Case(
        "one document for three splits",
        f"{TRAIN} --data-path good --split 98,1,1 {NULL}",
        files=plain,
        trains=True,
        works=without_evaluation_of("valid", "test"),
        seconds=120,
    ),
    Case(
        "a test split shorter than a sequence",
        f"{TRAIN} --dataset ready",
        files=ready("8000,800,20B"),
        trains=True,
        works=short_test,
        seconds=120,
    ),
]
