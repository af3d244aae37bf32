"""Odd files and numbers for ``rmoe data``, ``rmoe plan``, ``rmoe doctor`` and ``rmoe install``."""

import json
import struct
from pathlib import Path

from rmoe_megablocks import data
from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.data import LINES, PREPARE, TEXT, holds, ready

KEY = f"{PREPARE} --json-key text"
PAPER = "rmoe plan {repository}/configs/rmoe_0.9b_8xa100.yaml"


def loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def nowhere(folder: Path) -> None:
    (folder / "link").symlink_to("gone")


def same(folder: Path) -> None:
    (folder / "a").write_text(TEXT)
    (folder / "b").symlink_to("a")


def changed(**fields):
    """The prepared dataset ready/, whose dataset.json says something else."""

    def make(folder: Path) -> None:
        ready("80%,10%,10%")(folder)
        path = folder / "ready" / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return make


def misread_index(folder: Path) -> None:
    """An index that says it has more sequences than any file."""
    ready("80%,10%,10%")(folder)
    path = folder / "ready" / "train.idx"
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 18, 2**63)
    path.write_bytes(content)


def replaced(outcome):
    """The new dataset, in the place of the old one."""
    holds(TEXT)(outcome)
    assert {path.name for path in outcome.folder.iterdir()} == {"a", "out"}


def old_one(folder: Path) -> None:
    (folder / "a").write_text(TEXT)
    (folder / "old").write_text(TEXT[:500])
    data.prepare([folder / "old"], folder / "out", split="80%,10%,10%")
    (folder / "old").unlink()


def row(line: str, name: str = "rows.jsonl") -> dict:
    return {name: '{"text": "good"}\n' + line + "\n"}


CASES = [
    # files
    Case("an input that links to itself", f"{PREPARE} loop", files=loop, refused="loop: cannot be read .Too many"),
    Case("an input that links to nothing", f"{PREPARE} link", files=nowhere, refused="link: no such file"),
    Case("an input and a link to it", f"{PREPARE} a b", files=same, refused=r"b: is named twice .as a."),
    Case("a pattern that matches nothing", f"{PREPARE} '*.txt'", refused=r"\*.txt: no such file"),
    Case("an input below a file", f"{PREPARE} a/b", files={"a": TEXT}, refused="a/b: cannot be read .Not a directory"),
    Case("an empty folder as an input", f"{PREPARE} empty", files={"empty": None}, refused="empty: is a folder"),
    Case("an input of white space", f"{PREPARE} a", files={"a": " \n" * 50}, works=holds(" \n" * 50)),
    Case("an input with an empty name", f"{PREPARE} ''", refused="is a folder"),
    Case("a name of 300 letters", f"{PREPARE} {'x' * 300}", refused="cannot be read .File name too long"),
    Case(
        "half a character in the middle",
        f"{PREPARE} a",
        files={"a": TEXT.encode() + b"\xc3" + TEXT.encode()},
        refused="a: byte 9,?600 is not UTF-8",
    ),
    Case(
        "a mark in the middle",
        f"{PREPARE} a",
        files={"a": TEXT.encode() + b"\xef\xbb\xbf" + TEXT.encode()},
        works=holds(TEXT + "\ufeff" + TEXT),
    ),
    # rows
    Case("a row that is a list", f"{KEY} rows.jsonl", files=row('["a"]'), refused="rows.jsonl:2: "),
    Case("a row that is a number", f"{KEY} rows.jsonl", files=row("5"), refused="rows.jsonl:2: "),
    Case("a row whose text is a number", f"{KEY} rows.jsonl", files=row('{"text": 5}'), refused="rows.jsonl:2: "),
    Case("a row whose text is a list", f"{KEY} rows.jsonl", files=row('{"text": ["a"]}'), refused="rows.jsonl:2: "),
    Case("a row with half a pair", f"{KEY} rows.jsonl", files=row(r'{"text": "\ud800"}'), refused="rows.jsonl:2: "),
    Case("a row of brackets", f"{KEY} rows.jsonl", files=row("[" * 100_000), refused="rows.jsonl:2: not a row of JSON"),
    Case("rows with Windows line ends", f"{KEY} rows.jsonl", files={"rows.jsonl": LINES.replace("\n", "\r\n")},
         works=holds("".join(json.loads(line)["text"] for line in LINES.splitlines()))),
    Case("rows with empty texts alone", f"{KEY} rows.jsonl", files={"rows.jsonl": '{"text": ""}\n'},
         refused="rows.jsonl: has no text"),
    Case("an empty key", f"{PREPARE} --json-key '' rows.jsonl", files={"rows.jsonl": LINES}, refused="no key ''"),
    # outputs, splits, words
    Case("an output that is a file", f"{PREPARE} a", files={"a": TEXT, "out": ""}, refused="output out is a file"),
    Case("an output below a file", "rmoe data prepare a --output a/out --split 1,0,0", files={"a": TEXT},
         refused="output a/out: .*/a is no folder"),
    Case("an output with a dataset", f"{PREPARE} a", files=old_one, refused="output out has a dataset already"),
    Case("an output with a dataset, replaced", f"{PREPARE} a --overwrite", files=old_one, works=replaced),
    Case("a split of two", "rmoe data prepare a --output out --split 90%,10%", files={"a": TEXT}, refused="90%,10%"),
    Case("a split below nothing", "rmoe data prepare a --output out --split=-1,5,5", files={"a": TEXT}, refused="-1"),
    Case("a split of nan", "rmoe data prepare a --output out --split nan,0.1,0.1", files={"a": TEXT}, refused="nan"),
    Case("rmoe data prepare without --split", "rmoe data prepare a --output out", refused="required: --split"),
    Case("rmoe data prepare --workers 0", f"{PREPARE} a --workers 0", refused="unrecognized arguments: --workers 0"),
    Case("rmoe data without a command", "rmoe data", refused="required: COMMAND"),
    Case("rmoe alone", "rmoe", refused="required: COMMAND"),
    Case("rmoe with another command", "rmoe trian", refused="invalid choice: 'trian'"),
    # what a dataset says
    Case("rmoe data info of nothing", "rmoe data info nowhere", refused="nowhere/dataset.json: no such file"),
    Case("a dataset of another tokenizer", "rmoe data info ready", files=changed(tokenizer="words"),
         refused="dataset.json: corrupt metadata .*tokenizer 'words', expected one of bytes, sentencepiece"),
    Case("a dataset whose end of document is no id", "rmoe data info ready", files=changed(eod_id=256),
         refused="dataset.json: corrupt metadata .*eod_id 256"),
    Case("a dataset without splits", "rmoe data info ready", files=changed(splits=[]), refused="corrupt metadata"),
    Case("a dataset with a misread index", "rmoe data info ready", files=misread_index, refused="train.idx: truncated"),
    # plans
    Case("rmoe plan --nproc-per-node 0", f"{PAPER} --nproc-per-node 0", refused="--nproc-per-node 0: expected"),
    Case("rmoe plan --nnodes 0", f"{PAPER} --nnodes 0", refused="--nnodes 0: expected at least 1"),
    Case("rmoe plan with two numbers below nothing", f"{PAPER} --nproc-per-node=-2 --nnodes=-4",
         refused="--nproc-per-node -2: expected at least 1"),
    Case("rmoe plan --world-size 0", f"{PAPER} --world-size 0", refused="--world-size 0: expected at least 1"),
    Case("rmoe plan --world-size 8.5", f"{PAPER} --world-size 8.5", refused="--world-size: invalid int value: '8.5'"),
    Case("rmoe plan --gpu-memory nan", f"{PAPER} --gpu-memory nan", refused="--gpu-memory nan: expected GiB above 0"),
    Case("rmoe plan --gpu-memory inf", f"{PAPER} --gpu-memory inf", refused="--gpu-memory inf: expected GiB above 0"),
    Case("rmoe plan with RMOE_WORLD_SIZE=8.5", PAPER, env={"RMOE_WORLD_SIZE": "8.5"},
         refused="RMOE_WORLD_SIZE=8.5: expected a whole number above 0"),
    Case("rmoe plan with RMOE_GPU_MEMORY=nan", PAPER, env={"RMOE_GPU_MEMORY": "nan"},
         refused="RMOE_GPU_MEMORY=nan: expected a number above 0"),
    Case("rmoe plan without a configuration", "rmoe plan", refused="required: CONFIG"),
    Case("rmoe plan of a folder", "rmoe plan folder", files={"folder": None}, refused="folder is a directory"),
    # the others
    Case("rmoe doctor of something", "rmoe doctor gpus", refused="unrecognized arguments: gpus"),
    Case("rmoe install of something else", "rmoe install apex", refused="invalid choice: 'apex'"),
    Case("rmoe install into what is no Python", "rmoe install megablocks --python nowhere", refused="nowhere"),
]  # fmt: skip
