"""Made-up rows, a tiny folder, and the arguments of a fine-tuning."""

import argparse
import json
from pathlib import Path

from rmoe_megablocks import cli
from tests.evaluation.made import folder

LENGTH = 96
WORDS = ("cat", "dog", "sun", "sea", "oak", "ice", "fig", "owl")
ROWS = [
    {"instruction": f"Say {word} twice.", "input": "Be loud" if number % 2 else "", "output": f"{word} {word}!"}
    for number, word in enumerate(WORDS)
]


def tiny(place: Path, *kind, **changes) -> Path:
    """A model of bytes whose first layer is dense, with its tokenizer, which has no end of a text."""
    sizes = dict(num_hidden_layers=3, moe_layer_freq=[0, 1, 1], max_position_embeddings=LENGTH, initializer_range=0.1)
    return folder(place, *kind, **sizes | changes)


def written(place: Path, rows=ROWS) -> Path:
    place.write_text(json.dumps(rows))
    return place


def parsed(*words) -> argparse.Namespace:
    """Arguments of ``rmoe finetune``."""
    from rmoe_megablocks.finetuning import cli as room

    parser = argparse.ArgumentParser()
    room.add_arguments(parser.add_subparsers())
    return parser.parse_args(["finetune", *map(str, words)])


def finetune(*words) -> int:
    return cli.main(["finetune", *map(str, words)])
