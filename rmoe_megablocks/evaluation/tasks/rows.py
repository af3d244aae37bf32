"""Rows of tasks in files of JSON lines, found and checked: nothing here needs torch or the harness.

What the harness would take for a wrong answer without a word, as a label that is no choice, ends in one line here.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.tasks.known import TASKS

Row = dict[str, Any]


@dataclass(frozen=True)
class Local:
    """Rows of ``task`` from a folder.

    Attributes:
        split: the one that is scored, of ``path``.
        rows: of it, as the file has them; the fields that the task's definition reads are checked.
        examples: of the split that examples are drawn from, of ``examples_path``; empty where none are asked for.
    """

    task: str
    split: str
    path: Path
    rows: tuple[Row, ...]
    examples_path: Path | None = None
    examples: tuple[Row, ...] = ()

    @property
    def prepared(self) -> bool:
        """Whether they are HellaSwag's as its definition prepares them, with query, choices and gold."""
        return _is_prepared(self.task, self.rows[0])

    @property
    def note(self) -> str | None:
        """What makes the figure another one than the stock set's; None where split and number of rows are its own."""
        stock = TASKS[self.task]
        here, there = f"{len(self.rows):,} rows of {self.split}", f"{stock.rows:,} of {stock.splits[0]}"
        if self.split == stock.splits[0] and len(self.rows) == stock.rows:
            return None
        return f"{self.task}: {here}; the stock task scores {there}, so this is not its figure"


def find(folder: Path, task: str, shots: int) -> Local:
    """Rows of ``task`` in ``folder``: TASK_SPLIT.jsonl, or TASK_SPLIT_ANYTHING.jsonl.

    The scored split is the stock definition's if it is there, else another that has answers.

    Raises:
        UsageError: one line that names file, line and field.
    """
    known = TASKS[task]
    if not folder.is_dir():
        raise UsageError(f"--data-dir {folder}: no such folder")
    found = ((split, path) for split in known.splits if (path := _file(folder, task, split)))
    split, path = next(found, (None, None))
    if path is None:
        wanted = " or ".join(f"{task}_{split}.jsonl" for split in known.splits)
        raise UsageError(f"--data-dir {folder} has no {wanted}")
    rows = _read(path, task)
    if len(rows) < 2:
        raise UsageError(f"{path} has one row: a standard error takes two")
    if not shots:
        return Local(task, split, path, rows)
    examples_path = _file(folder, task, known.examples)
    if examples_path is None:
        raise UsageError(
            f"--num-fewshot {shots}: the stock {task} draws its examples from the split {known.examples}, and "
            f"--data-dir {folder} has no {task}_{known.examples}.jsonl"
        )
    examples = _read(examples_path, task)
    if len(examples) < shots:
        raise UsageError(f"--num-fewshot {shots}: {examples_path} has {len(examples)} rows")
    found = Local(task, split, path, rows, examples_path, examples)
    if found.prepared != _is_prepared(task, examples[0]):
        raise UsageError(f"{examples_path} and {path}: one is prepared (query, choices, gold), the other is not")
    return found


def _is_prepared(task: str, row: Row) -> bool:
    return task == "hellaswag" and "endings" not in row


def _file(folder: Path, task: str, split: str) -> Path | None:
    found = sorted({*folder.glob(f"{task}_{split}.jsonl"), *folder.glob(f"{task}_{split}_*.jsonl")})
    if len(found) > 1:
        raise UsageError(f"--data-dir {folder}: {found[0].name} and {found[1].name} are of one split: leave one there")
    return found[0] if found else None


def _read(path: Path, task: str) -> tuple[Row, ...]:
    check = _CHECKS[task]
    rows: list[Row] = []
    read: list[Row] = []  # of the rows, what the definition reads
    for where, value in _objects(path):
        read.append(check(where, value))
        if read[-1].keys() != read[0].keys():
            raise UsageError(f"{where} has the fields {', '.join(read[-1])}, the first row has {', '.join(read[0])}")
        rows.append(value | read[-1])
    if not rows:
        raise UsageError(f"{path} is empty")
    return tuple(rows)


def _objects(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start:,}: rows are JSON") from None
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may have U+2028
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where} is not JSON ({error}); expected an object a line") from None
        if not isinstance(value, dict):
            raise UsageError(f"{where}: expected an object, got {type(value).__name__}")
        yield where, value


def _arc(where: str, row: Row) -> Row:
    choices = _field(where, row, "choices", dict)
    texts, labels = _texts(where, choices, "text"), _texts(where, choices, "label")
    key = _text(where, row, "answerKey")
    if len(labels) != len(texts) or len(set(labels)) != len(labels) or key not in labels:
        raise UsageError(f"{where}: answerKey {key!r}, expected one of as many different labels as texts: {labels}")
    return {
        "question": _text(where, row, "question"),
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }


def _hellaswag(where: str, row: Row) -> Row:
    """As the stock set has it, or as its definition's own ``process_docs`` leaves it (query, choices, gold)."""
    if _is_prepared("hellaswag", row):
        choices = _texts(where, row, "choices")
        return {
            "query": _text(where, row, "query"),
            "choices": choices,
            "gold": _index(where, row, "gold", len(choices)),
        }
    endings = _texts(where, row, "endings")
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():  # the stock set has texts there
        row = row | {"label": int(label)}
    return {
        "activity_label": _text(where, row, "activity_label"),
        "ctx_a": _text(where, row, "ctx_a"),
        "ctx_b": _text(where, row, "ctx_b", empty=True),
        "endings": endings,
        "label": str(_index(where, row, "label", len(endings))),
    }


def _piqa(where: str, row: Row) -> Row:
    texts = {name: _text(where, row, name) for name in ("goal", "sol1", "sol2")}
    return {**texts, "label": _index(where, row, "label", 2)}


def _sciq(where: str, row: Row) -> Row:
    names = ("question", "distractor1", "distractor2", "distractor3", "correct_answer")
    return {**{name: _text(where, row, name) for name in names}, "support": _text(where, row, "support", empty=True)}


def _lambada(where: str, row: Row) -> Row:
    text = _text(where, row, "text")
    before, _, last = text.rpartition(" ")
    if not before.strip() or not last.strip():
        raise UsageError(f"{where}: field text has to end in a word that other words and one space stand before")
    return {"text": text}


_CHECKS: dict[str, Callable[[str, Row], Row]] = {
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "sciq": _sciq,
    "lambada_openai": _lambada,
}


def _field(where: str, row: Row, name: str, kind: type) -> Any:
    if name not in row:
        raise UsageError(f"{where}: has no field {name} (it has {', '.join(row) or 'none'})")
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise UsageError(f"{where}: field {name} is {type(row[name]).__name__}, expected {kind.__name__}")
    return row[name]


def _text(where: str, row: Row, name: str, empty: bool = False) -> str:
    text = _field(where, row, name, str)
    if not text and not empty:
        raise UsageError(f"{where}: field {name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: field {name} has half of a surrogate pair, which is no text") from None
    return text


def _texts(where: str, row: Row, name: str) -> list[str]:
    texts = _field(where, row, name, list)
    if len(texts) < 2:
        raise UsageError(f"{where}: field {name} has {len(texts)} texts, expected at least two to choose from")
    return [_text(where, {f"{name}[{number}]": text}, f"{name}[{number}]") for number, text in enumerate(texts)]


def _index(where: str, row: Row, name: str, choices: int) -> int:
    value = _field(where, row, name, int)
    if not 0 <= value < choices:
        raise UsageError(f"{where}: field {name} is {value}, expected 0 to {choices - 1}")
    return value
