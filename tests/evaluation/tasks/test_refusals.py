"""What ``rmoe eval --tasks`` refuses before anything of the harness is imported: one line that names the culprit."""

import importlib.metadata
import importlib.util
import sys

import pytest

from tests.evaluation.made import refused
from tests.evaluation.tasks import sets
from tests.evaluation.tasks.sets import ALL, ARC, HELLASWAG, LAMBADA, PIQA, SCIQ


@pytest.fixture
def model(tmp_path):
    """A folder that is a model's by its first look alone."""
    place = tmp_path / "hf"
    place.mkdir()
    (place / "config.json").write_text("{}")
    return place


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Whoever gets as far as the harness fails."""
    monkeypatch.setitem(sys.modules, "rmoe_megablocks.evaluation.tasks.running", None)


pytestmark = pytest.mark.usefixtures("nothing_loaded")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--tasks", "piqa", "--data", "x"], "--data does not go with --tasks (use --data-dir)"),
        (["--tasks", "piqa", "--json", "x"], "--json does not go with --tasks (use --out)"),
        (["--tasks", "piqa", "--micro-batch-size", 2], "--micro-batch-size does not go with --tasks"),
        (["--tasks", "piqa", "--seq-length", 2], "--seq-length does not go with --tasks"),
        (["--tasks", "piqa", "--pipeline-model-parallel-size", 2], "unrecognized arguments for --tasks"),
        (["--data", "x", "--data-dir", "y"], "--data-dir belongs to --tasks"),
        (["--data", "x", "--num-fewshot", 0], "--num-fewshot belongs to --tasks"),
        (["--data", "x", "--batch-size", 2], "--batch-size belongs to --tasks"),
        (["--data", "x", "--limit", 2], "--limit belongs to --tasks"),
        (["--data", "x", "--out", "y"], "--out belongs to --tasks"),
        ([], "nothing to evaluate on"),
        (["--tasks", "arc_esy"], "'arc_esy' is unknown (did you mean arc_easy?)"),
        (["--tasks", "piqa,,sciq"], "--tasks piqa,,sciq: '' is unknown"),
        (["--tasks", "piqa,sciq,piqa"], "piqa is named twice"),
        (["--tasks", "piqa", "--limit", 1], "a standard error takes two rows"),
        (["--tasks", "piqa", "--limit", -3], "--limit -3: expected at least 2"),
        (["--tasks", "piqa", "--num-fewshot", -1], "--num-fewshot -1"),
        (["--tasks", "piqa", "--batch-size", 0], "--batch-size 0"),
        (["--tasks", "piqa", "--out", "nowhere/x.json"], "--out nowhere/x.json"),
        (["--tasks", "lambada_openai", "--num-fewshot", 2], "lambada_openai has no rows but those"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    ],
)
def test_options(model, capsys, words, expected):
    assert expected in refused(capsys, "eval", model, *words)


def test_what_is_no_folder(tmp_path, capsys):
    assert "no such folder" in refused(capsys, "eval", tmp_path / "none", "--tasks", "piqa")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    assert "rmoe export makes one" in refused(capsys, "eval", tmp_path, "--tasks", "piqa")


def test_several_processes(model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused(capsys, "eval", model, "--tasks", "piqa")


def test_without_the_extra(model, capsys, monkeypatch):
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.12" if name == "lm-eval" else version(name))
    said = refused(capsys, "eval", model, "--tasks", "piqa")
    assert "lm-eval 0.4.12" in said and "pip install 'rmoe-megablocks[eval]'" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    assert "lm-eval is not installed: pip install 'rmoe-megablocks[eval]'" in refused(
        capsys, "eval", model, "--tasks", "piqa"
    )


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}


# name of the case: task, its rows or the bytes of its file, what is said
ROWS = {
    "empty": ("piqa", b"\n", "is empty"),
    "no JSON": ("piqa", b'{"goal": \n', "line 1 is not JSON"),
    "no UTF-8": ("piqa", b"\xff{}", "not UTF-8 at byte 0"),
    "no object": ("piqa", b"[1]", "line 1: expected an object, got list"),
    "one row": ("piqa", PIQA[:1], "has one row"),
    "a missing field": ("piqa", [PIQA[0], without(PIQA[1], "sol2")], "line 2: has no field sol2"),
    "another type": ("piqa", [PIQA[0], PIQA[1] | {"goal": 3}], "line 2: field goal is int, expected str"),
    "no label": ("piqa", [PIQA[0], PIQA[1] | {"label": -1}], "line 2: field label is -1, expected 0 to 1"),
    "a label as text": ("piqa", [PIQA[0] | {"label": "0"}], "field label is str, expected int"),
    "a label as boolean": ("piqa", [PIQA[0] | {"label": True}], "field label is bool"),
    "an empty answer": ("piqa", [PIQA[0] | {"sol1": ""}], "field sol1 is empty"),
    "half a pair": ("piqa", [PIQA[0] | {"sol1": "\ud800"}], "half of a surrogate pair"),
    "no such key": ("arc_easy", [ARC[0] | {"answerKey": "E"}], "answerKey 'E'"),
    "labels too few": ("arc_easy", [ARC[0] | {"choices": {"text": ["a", "b"], "label": ["A"]}}], "label has 1 texts"),
    "labels twice": ("arc_easy", [ARC[0] | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}], "different labels"),
    "choices as list": ("arc_easy", [ARC[0] | {"choices": ["a", "b"]}], "field choices is list, expected dict"),
    "an empty choice": ("hellaswag", [HELLASWAG[0] | {"endings": ["a", ""]}], "field endings[1] is empty"),
    "beyond the choices": ("hellaswag", [HELLASWAG[0] | {"label": "4"}], "field label is 4, expected 0 to 3"),
    "unlabelled": ("hellaswag", [HELLASWAG[0] | {"label": ""}], "field label is str"),
    "neither form": ("hellaswag", [{"query": "a"}], "has no field choices"),
    "both forms": (
        "hellaswag",
        [{"query": "a", "choices": ["b", "c"], "gold": 1}, HELLASWAG[0]],
        "line 2 has the fields activity_label",
    ),
    "no support": ("sciq", [without(SCIQ[0], "support")], "has no field support"),
    "one word": ("lambada_openai", [LAMBADA[0], {"text": "word"}], "line 2: field text has to end in a word"),
    "a last space": ("lambada_openai", [{"text": "two words "}], "line 1: field text has to end in a word"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(model, tmp_path, capsys, case):
    task, rows, expected = ROWS[case]
    place = sets.folder(tmp_path / "rows")
    path = place / f"{task}_{sets.SCORED[task]}.jsonl"
    path.write_bytes(rows if isinstance(rows, bytes) else sets.lines(rows).encode())
    said = refused(capsys, "eval", model, "--tasks", ALL, "--data-dir", place)
    assert expected in said and str(path) in said


def test_files(model, tmp_path, capsys):
    place = sets.folder(tmp_path / "rows")
    words = ["eval", model, "--data-dir", place, "--tasks"]
    said = refused(capsys, *words, "piqa,sciq", "--num-fewshot", 2)
    assert "draws its examples from the split train" in said and "piqa_train.jsonl" in said
    (place / "piqa_train.jsonl").write_text(sets.lines(PIQA))
    assert "--num-fewshot 5" in refused(capsys, *words, "piqa", "--num-fewshot", 5)
    (place / "piqa_validation_2.jsonl").write_text("")
    assert "are of one split" in refused(capsys, *words, "piqa")
    (place / "sciq_test.jsonl").unlink()
    assert "has no sciq_test.jsonl or sciq_validation.jsonl" in refused(capsys, *words, "sciq")
