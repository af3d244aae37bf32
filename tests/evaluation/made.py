"""Small folders to evaluate and to generate with, and the one line that bad input ends in."""

import json
from pathlib import Path

from rmoe_megablocks import cli
from rmoe_megablocks.conversion.folder import tokenizers
from tests.huggingface.built import model

LENGTH = 16
TEXT = b" \n = Robert Boulter = \n \n Robert Boulter is an English film , television and <unk> actor . \n"


def folder(place: Path, *kind, **changes) -> Path:
    """A model of bytes with its tokenizer."""
    made = model(*kind, **dict(vocab_size=256, max_position_embeddings=LENGTH) | changes)
    made.save_pretrained(place)
    tokenizers._bytes(None).save_pretrained(place)
    return place


def config(place: Path, **values) -> None:
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(capsys, *words) -> str:
    """The one line of a command that ends in code 2."""
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("evaluating:")]
    assert not out and len(lines) == 1 and lines[0].startswith("rmoe: error: "), (out, err)
    return lines[0]
