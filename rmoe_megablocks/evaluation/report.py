"""An evaluation's result: as JSON, and as a table of 80 columns."""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import texts
from rmoe_megablocks.evaluation.measures import figures

_WIDTH = 80
_ROWS = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
    "nats_per_token": "nats per token",
    "token_perplexity": "token perplexity",
    "word_perplexity": "word perplexity (words and ends of lines)",
    "word_perplexity_without_line_ends": "word perplexity (words alone)",
}


@dataclass(frozen=True)
class Done:
    """What was predicted: ``nats`` of ``tokens`` tokens, in windows of ``seq_length`` every ``stride``."""

    nats: float
    tokens: int
    interrupted: bool
    seq_length: int
    stride: int


def result_of(path: Path, text: texts.Text, done: Done) -> dict[str, Any]:
    """What every result says of text, windows and figures, whichever model gave the losses."""
    of = len(text.tokens) - 1
    return {
        "data": path.name + (f" {text.split}" if text.split else ""),
        "partial": done.tokens < of,
        **vars(done),
        "of": of,
        **figures(done.nats, done.tokens, len(text.tokens), text.counts),
        **vars(text.counts),
        "unknown_tokens": text.unknown,
        "tokens_sha256": texts.checksum(text.tokens),
        "notes": list(text.notes),
    }


def table(result: dict[str, Any]) -> str:
    """Lines of at most 80 columns; what is partial says so first."""
    lines = [f"{result['model']} on {result['data']}"]
    if result["partial"]:
        why = "interrupted" if result["interrupted"] else "--eval-tokens"
        lines.append(f"PARTIAL ({why}): the first {result['tokens']:,} of {result['of']:,} tokens")
    rows = [(words, _number(result[key])) for key, words in _ROWS.items()]
    rows += [
        ("tokens predicted", f"{result['tokens']:,}"),
        ("windows", f"{result['seq_length']:,} tokens, stride {result['stride']:,}"),
        ("text", ", ".join(f"{result[key]:,} {key}" for key in ("bytes", "words") if result[key] is not None)),
        ("computed in", f"{result['dtype']}, {result['layout']}"),
    ]
    left = max(len(words) for words, _ in rows)
    lines += [f"  {words.ljust(left)}  {value}" for words, value in rows]
    return "\n".join(part for line in [*lines, *result["notes"]] for part in wrapped(line))


def wrapped(line: str) -> list[str]:
    """``line`` as lines of at most 80 columns."""
    return [line] if len(line) <= _WIDTH else textwrap.wrap(line, _WIDTH, subsequent_indent="    ")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.5f}" if value < 1e5 else f"{value:.5g}"


def check_json(path: Path | None, option: str = "--json") -> None:
    """For the file of ``option``. Raises UsageError if the result could not be written later."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: expected a file in a folder that exists")


def tell(result: dict[str, Any], path: Path | None) -> int:
    """Prints the table, writes ``path`` if there is one; the exit code, 130 after an interruption."""
    print(table(result))
    if path is not None:
        try:
            path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"--json {path}: cannot be written ({error.strerror})") from error
        print(f"rmoe: {path}", file=sys.stderr)
    return 130 if result["interrupted"] else 0
