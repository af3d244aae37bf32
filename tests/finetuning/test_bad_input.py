"""One line, exit code 2, and nothing written."""

import importlib.util

import pytest

from tests.evaluation.made import config, refused
from tests.finetuning.made import LENGTH, ROWS, tiny, written


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    return tiny(place / "hf"), written(place / "rows.json")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--epochs", 0], "--epochs 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--warmup-ratio", 1], "--warmup-ratio 1"),
        (["--aux-loss", -1], "--aux-loss -1"),
        (["--max-steps", 0], "--max-steps 0"),
        (["--seed", -1], "--seed -1"),
        (["--global-batch-size", 6, "--micro-batch-size", 4], "expected a multiple of --micro-batch-size 4 times 1"),
        (["--seq-length", LENGTH + 1], f"the model has been made for {LENGTH}"),
        (["--seq-length", 16], "no row has a token of a response within --seq-length 16"),
        (["--packing"], "unrecognized arguments: --packing"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_arguments(made, tmp_path, capsys, words, expected):
    found = refused(capsys, "finetune", made[0], "--data", made[1], "--out", tmp_path / "out", *words)
    assert expected in found and not list(tmp_path.iterdir())


def test_places(made, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert "exists" in refused(capsys, "finetune", made[0], "--data", made[1], "--out", tmp_path / "there")
    assert "exists" in refused(capsys, "finetune", made[0], "--data", made[1], "--out", tmp_path / "there", "--resume")
    new = ["--out", tmp_path / "new"]
    assert "no such file" in refused(capsys, "finetune", made[0], "--data", tmp_path / "none", *new)
    assert "no such folder" in refused(capsys, "finetune", tmp_path / "none", "--data", made[1], *new)
    assert "no config.json" in refused(capsys, "finetune", tmp_path / "there", "--data", made[1], *new)
    rows = written(tmp_path / "rows.json", [*ROWS, {"instruction": "x"}])
    assert "rows.json: row 9: has no field output" in refused(capsys, "finetune", made[0], "--data", rows, *new)


def test_folders(made, tmp_path, capsys):
    place = tiny(tmp_path / "hf")
    words = ["finetune", place, "--data", made[1], "--out", tmp_path / "out"]
    capsys.readouterr()
    config(place, router_options={"moe_router_rnn_hidden_size": 7})  # another P than the weights'
    assert "mismatched_keys" in refused(capsys, *words)
    config(place, router_type="linear", router_options={}, moe_layer_freq=[0, 0, 0])
    assert "has no load-balancing loss" in refused(capsys, *words, "--aux-loss", 0.1)
    for path in place.glob("token*"):
        path.unlink()
    assert "has no tokenizer" in refused(capsys, *words)
    assert not (tmp_path / "out.partial").exists()


def test_no_router_to_freeze(made, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    place = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(place)
    for path in made[0].glob("token*"):
        (place / path.name).write_bytes(path.read_bytes())
    words = ["finetune", place, "--data", made[1], "--out", tmp_path / "out"]
    assert "--freeze-router" in refused(capsys, *words, "--freeze-router")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra(made, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a))
    found = refused(capsys, "finetune", made[0], "--data", made[1], "--out", tmp_path / "out")
    assert "trl is not installed: pip install 'rmoe-megablocks[finetune]'" in found
