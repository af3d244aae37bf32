"""Small sets of the five tasks in the stock sets' fields, and folders of them. Lengths differ, and some are equal."""

import json
from pathlib import Path

ALL = "arc_easy,hellaswag,piqa,sciq,lambada_openai"


def _arc(question: str, texts: list[str], key: str, labels: str = "ABCDE") -> dict:
    return {
        "id": question[:4],
        "question": question,
        "choices": {"text": texts, "label": list(labels[: len(texts)])},
        "answerKey": key,
    }


ARC = [
    _arc("Which of these melts first?", ["ice", "iron", "rock", "glass"], "A"),
    _arc("Where do roots grow?", ["in the air", "underground"], "2", "12"),
    _arc("What do bees carry?", ["sand", "pollen", "snow"], "B"),
    _arc("Was ist größer?", ["Löwe", "Maus", "Käfer", "Floh", "Wal"], "E"),
    _arc("How many legs has a spider?", ["two", "six", "ten", "8"], "D"),
]
HELLASWAG = [
    {
        "ind": 1,
        "activity_label": "Baking [title]",
        "ctx_a": "She opens the  oven.",
        "ctx_b": "the cake",
        "endings": ["is [substeps] done.", "drives a  car away.", "sings.", "paints the fence green."],
        "label": "0",
    },
    {
        "ind": 2,
        "activity_label": "Rowing",
        "ctx_a": "Two men sit in a boat.",
        "ctx_b": "",
        "endings": ["they fly.", "they row on.", "they bake.", "they read."],
        "label": "1",
    },
    {
        "ind": 3,
        "activity_label": "Painting",
        "ctx_a": "A wall is white.",
        "ctx_b": "a man",
        "endings": ["eats it.", "leaves.", "sleeps.", "takes a brush and a pot of paint and begins."],
        "label": "3",
    },
]
PIQA = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the moon", "label": 0},
    {"goal": "dry a shirt", "sol1": "put it in a lake", "sol2": "hang it in the sun", "label": 1},
    {"goal": "sharpen a pencil", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
    {"goal": "see in the dark", "sol1": "close your eyes", "sol2": "light a lamp", "label": 1},
]
SCIQ = [
    {
        "question": question,
        "distractor3": third,
        "distractor1": first,
        "distractor2": second,
        "correct_answer": answer,
        "support": support,
    }
    for question, first, second, third, answer, support in [
        ("What do plants take in?", "gold", "noise", "paper", "light", "  Plants live on light and water."),
        ("What is water made of?", "iron", "helium and neon", "salt", "hydrogen and oxygen", ""),
        ("What pulls things down?", "wind", "sound", "fire", "gravity", " Things fall."),
    ]
]
LAMBADA = [
    {"text": "She looked for the key in every room until at last, under the mat, she found the key"},
    {"text": "\u201cWho is there?\u201d he asked.  Nobody but the old dog answered,\n\nand he patted the dog"},
    {"text": "The two of them went home"},
]
#: HELLASWAG as the stock definition prepares it, by hand: brackets and double spaces go, ctx_b begins in a capital
PREPARED = [
    {
        "query": "Baking. : She opens the oven. The cake",
        "choices": ["is done.", "drives a car away.", "sings.", "paints the fence green."],
        "gold": 0,
    },
    {
        "query": "Rowing: Two men sit in a boat.",
        "choices": ["they fly.", "they row on.", "they bake.", "they read."],
        "gold": 1,
    },
    {
        "query": "Painting: A wall is white. A man",
        "choices": ["eats it.", "leaves.", "sleeps.", "takes a brush and a pot of paint and begins."],
        "gold": 3,
    },
]
STOCK = {"arc_easy": ARC, "hellaswag": HELLASWAG, "piqa": PIQA, "sciq": SCIQ, "lambada_openai": LAMBADA}
SCORED = {"arc_easy": "test", "hellaswag": "validation", "piqa": "validation", "sciq": "test", "lambada_openai": "test"}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder(place: Path, **others: list[dict]) -> Path:
    """All five, each in the split that is scored; ``others`` by the name of the file, in the place of those or more."""
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in ({f"{task}_{SCORED[task]}": rows for task, rows in STOCK.items()} | others).items():
        (place / f"{name}.jsonl").write_text(lines(rows))
    return place
