"""``rmoe eval`` of folders: its figures against losses taken one by one, its files, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rmoe_megablocks import cli, data
from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.evaluation import folders
from rmoe_megablocks.huggingface import RmoeForCausalLM
from tests.evaluation.made import LENGTH, TEXT, config, folder, refused

ALL_CELLS = os.environ.get("RMOE_TEST_ALL_CELLS") == "1"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("made") / "hf")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, text) -> Path:
    out = tmp_path_factory.mktemp("data") / "dataset"
    data.prepare([text], out, split=f"{len(TEXT) - 60}B,0B,60B")
    return out


def evaluate(tmp_path, capsys, *words) -> dict:
    assert cli.main(["eval", *map(str, words), "--json", str(tmp_path / "result.json")]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"{result['bits_per_byte']:.5f}" in table and "PARTIAL" not in table
    return result


@torch.no_grad()
def one_by_one(model, tokens: list[int], length: int, stride: int) -> float:
    """Bits of all tokens but the first, each from a forward pass of its own over what its window shows it."""
    bits = 0.0
    for place in range(1, len(tokens)):
        start = 0 if place <= length else -(-(place - length) // stride) * stride
        logits = model(torch.tensor([tokens[start:place]])).logits[0, -1].double()
        bits -= logits.log_softmax(-1)[tokens[place]].item() / math.log(2)
    return bits


@pytest.mark.parametrize("stride", [LENGTH, 5])
def test_bits_per_byte(made, text, tmp_path, capsys, stride):
    result = evaluate(tmp_path, capsys, made, "--data", text, "--stride", stride, "--micro-batch-size", 3)
    tokens = list(TEXT)
    bits = one_by_one(RmoeForCausalLM.from_pretrained(made).eval(), tokens, LENGTH, stride)
    assert result["bits_per_byte"] == pytest.approx(bits / (len(tokens) - 1), abs=1e-5)
    assert (result["tokens"], result["of"], result["bytes"]) == (len(tokens) - 1, len(tokens) - 1, len(tokens))
    assert (result["words"], result["lines"]) == (16, 4)
    assert not result["partial"] and (result["seq_length"], result["stride"]) == (LENGTH, stride)


def test_a_dataset_is_its_text(made, dataset, tmp_path, capsys):
    (tmp_path / "tail").write_bytes(TEXT[-60:])
    of_split, of_text = (evaluate(tmp_path, capsys, made, "--data", what) for what in (dataset, tmp_path / "tail"))
    for result in (of_split, of_text):
        del result["data"], result["seconds"]
    assert of_split == of_text


def test_the_first_tokens_alone(made, text, tmp_path, capsys):
    assert cli.main(["eval", str(made), "--data", str(text), "--eval-tokens", "20"]) == 0
    assert f"PARTIAL (--eval-tokens): the first 20 of {len(TEXT) - 1} tokens" in capsys.readouterr().out


def test_another_causal_model(text, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizers._bytes(None).save_pretrained(tmp_path / "gpt2")
    result = evaluate(tmp_path, capsys, tmp_path / "gpt2", "--data", text)
    bits = one_by_one(theirs, list(TEXT), 8, 8)
    assert result["bits_per_byte"] == pytest.approx(bits / (len(TEXT) - 1), abs=1e-5)


def test_ctrl_c(made, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folders, "_with_progress", interrupted(folders._with_progress))
    words = ["eval", made, "--data", text, "--micro-batch-size", 1, "--json", tmp_path / "result.json"]
    assert cli.main([str(word) for word in words]) == 130
    assert f"PARTIAL (interrupted): the first {2 * LENGTH} of" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["partial"] and result["interrupted"] and result["tokens"] == 2 * LENGTH


def interrupted(evaluation):
    """The same, but Ctrl-C comes in the second forward pass."""

    def run(model, *others):
        calls = []

        def hook(*_):
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)

        model.register_forward_pre_hook(hook)
        return evaluation(model, *others)

    return run


@pytest.mark.skipif(not ALL_CELLS, reason="starts two processes; RMOE_TEST_ALL_CELLS=1 runs it")
def test_two_processes(made, text, tmp_path, capsys):
    alone = evaluate(tmp_path, capsys, made, "--data", text, "--stride", 5, "--micro-batch-size", 3)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    words = ["eval", made, "--data", text, "--stride", 5, "--micro-batch-size", 3, "--json", tmp_path / "two.json"]
    subprocess.run([*start, "--nproc-per-node=2", "-m", "rmoe_megablocks.cli", *map(str, words)], check=True)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["nats"] == pytest.approx(alone["nats"], rel=1e-7) and two["tokens"] == alone["tokens"]
    assert two["layout"] == "2 processes on cpu"


def weights(place: Path, change) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


FOLDERS = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "neither a Hugging Face folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "another task": (lambda f: config(f, model_type="t5"), "which is no causal language model"),
    "an unknown model": (lambda f: config(f, model_type="nobody"), "cannot be loaded"),
    "a missing field": (lambda f: config(f, router_type="nobody"), "router_type"),
    "code of its own": (
        lambda f: config(f, model_type="x", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
        "add --trust-remote-code",
    ),
    "a router's code": (lambda f: config(f, router_type="their.module:Router"), "add --trust-router-code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cannot be loaded",
    ),
    "a missing weight": (lambda f: weights(f, lambda t: t.pop("model.norm.weight")), "missing_keys"),
    "one too many": (lambda f: weights(f, lambda t: t.update(extra=torch.zeros(2))), "unexpected_keys, as extra"),
    "not a number": (lambda f: weights(f, lambda t: t["lm_head.weight"].fill_(math.nan)), "the loss is nan"),
    "changed": (
        lambda f: (f / "SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n"),
        "model.safetensors is not as SHA256SUMS says",
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folders(made, text, tmp_path, capsys, case):
    damage, expected = FOLDERS[case]
    place = shutil.copytree(made, tmp_path / "folder")
    damage(place)
    assert expected in refused(capsys, "eval", place, "--data", text)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--stride", 17], "--stride 17 is larger than --seq-length 16"),
        (["--stride", 0], "--stride 0"),
        (["--seq-length", 17], "--seq-length 17: the model has been made for 16"),
        (["--eval-tokens", 0], "--eval-tokens 0"),
        (["--json", "nowhere/result.json"], "--json nowhere/result.json"),
        (["--device", "nothing"], "--device nothing"),
        (["--split", "test"], "is a file"),
        (["--pipeline-model-parallel-size", 2], "unrecognized arguments for a Hugging Face folder"),
    ],
)
def test_bad_options(made, text, capsys, words, expected):
    assert expected in refused(capsys, "eval", made, "--data", text, *words)


def test_bad_data(made, dataset, tmp_path, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "one").write_bytes(b"a")
    for name, expected in (("empty", "is empty"), ("one", "nothing to predict"), ("none", "no such file")):
        assert expected in refused(capsys, "eval", made, "--data", tmp_path / name)
    assert "--split valid" in refused(capsys, "eval", made, "--data", dataset, "--split", "valid")
    (tmp_path / "folder").mkdir()
    assert "dataset.json" in refused(capsys, "eval", made, "--data", tmp_path / "folder")
    assert "no such folder" in refused(capsys, "eval", tmp_path / "nowhere", "--data", dataset)


def test_a_dataset_of_another_tokenizer(made, dataset, tmp_path, capsys):
    other = shutil.copytree(dataset, tmp_path / "other")
    config_path = other / "dataset.json"
    said = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(said | {"eod_id": 255}))
    assert "end in id 255" in refused(capsys, "eval", made, "--data", other)
    config_path.write_text(json.dumps(said | {"tokenizer": "sentencepiece", "tokenizer_model": "m.model"}))
    assert "prepared with the tokenizer m.model" in refused(capsys, "eval", made, "--data", other)


def test_without_transformers(made, text, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )
    assert "pip install 'rmoe-megablocks[hf]'" in refused(capsys, "eval", made, "--data", text)
    assert "pip install 'rmoe-megablocks[hf]'" in refused(capsys, "generate", made, "a")
