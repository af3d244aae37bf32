"""Bad input ends in one line that names it, and leaves nothing in the place of what was asked for."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmoe_megablocks import cli
from rmoe_megablocks.torch_dist.unpickling import read_index
from tests.conversion import made as models
from tests.conversion.cells import GRU, UNTIED
from tests.faults import full

NAME = f"iter_{models.ITERATION:07d}"
WEIGHTS = "model.safetensors"
MIXED = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "folder"
    assert cli.main(["export", str(made(*UNTIED, *GRU)), str(folder), "--no-verify", "--tokenizer", "bytes"]) == 0
    (folder / "SHA256SUMS").unlink()
    return folder


def refused(capsys, *words: str) -> str:
    """The one line of a command that ends in code 2."""
    assert cli.main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "B/s" not in line and "?B" not in line]
    assert len(lines) == 1 and lines[0].startswith("rmoe: error: "), lines
    return lines[0]


def change(folder: Path, changed) -> None:
    tensors = load_file(folder / WEIGHTS)
    changed(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def twice(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "other.safetensors")
    places = dict.fromkeys(tensors, WEIGHTS) | {"model.norm.weight": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


IMPORTS = {
    "missing": (
        lambda f: change(f, lambda t: t.pop("model.layers.1.mlp.router.layer.projector")),
        "model.layers.1.mlp.router.layer.projector is missing",
    ),
    "extra": (lambda f: change(f, lambda t: t.update(extra=torch.zeros(2))), "extra has no place in the model"),
    "wrong size": (
        lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight is [31], config.json makes it [32]",
    ),
    "twice": (twice, "model.norm.weight is in model.safetensors and in other.safetensors"),
    "mixed precisions": (
        lambda f: change(f, lambda t: t.update({MIXED: t[MIXED].bfloat16()})),
        "Megatron keeps both in one tensor",
    ),
    "whole numbers": (
        lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})),
        "model.norm.weight is of I32",
    ),
    "wrong P": (
        lambda f: config(f, router_options={"moe_router_rnn_hidden_size": 16}),
        "model.shared_router.weight_ih is [24, 8], config.json makes it [48, 16]",
    ),
    "unknown layout": (lambda f: config(f, model_type="llama"), "model_type is 'llama', expected 'rmoe'"),
    "an option of another router": (
        lambda f: config(f, router_options={"moe_router_size": 1}),
        "the router type gru has no moe_router_size",
    ),
    "rotation": (
        lambda f: config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
        "rope_parameters must be of rope_type default",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "truncated weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged"),
    "changed weights": (
        lambda f: (f / "SHA256SUMS").write_text("0" * 64 + f"  {WEIGHTS}\n"),
        f"{WEIGHTS} is not as SHA256SUMS says",
    ),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_import(exported, tmp_path, capsys, case):
    damage, expected = IMPORTS[case]
    folder = shutil.copytree(exported, tmp_path / "folder")
    damage(folder)
    assert expected in refused(capsys, "import", folder, tmp_path / "checkpoints")
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def drop(checkpoint: Path, name: str) -> None:
    edit(checkpoint, lambda entries: entries.pop(name))


def rename(checkpoint: Path, name: str, to: str) -> None:
    edit(checkpoint, lambda entries: entries.update({to: entries[name]}))


def edit(checkpoint: Path, change) -> None:
    index = read_index(checkpoint)
    change(index.state_dict_metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def version(checkpoint: Path, number: int) -> None:
    (checkpoint / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": number})
    )


NORM = "decoder.final_layernorm.weight"
EXPORTS = {
    "missing": (lambda c: drop(c, NORM), f"{NORM} is missing"),
    "not known": (lambda c: rename(c, NORM, "decoder.new.weight"), "decoder.new.weight has no place"),
    "newer": (lambda c: version(c, 2), "is of version 2 of its format, version 1 is known"),
    "no index": (lambda c: (c / ".metadata").unlink(), ".metadata"),
    "damaged index": (lambda c: (c / ".metadata").write_bytes(b"\x80\x02}q\x00"), "damaged or incomplete"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_export(made, tmp_path, capsys, case):
    damage, expected = EXPORTS[case]
    checkpoints = shutil.copytree(made(*UNTIED, *GRU), tmp_path / "checkpoints")
    damage(checkpoints / NAME)
    models.seal(checkpoints / NAME)
    said = refused(capsys, "export", checkpoints, tmp_path / "folder", "--no-verify", "--tokenizer", "bytes")
    assert expected in said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_a_damaged_byte(made, tmp_path, capsys):
    checkpoints = shutil.copytree(made(*UNTIED, *GRU), tmp_path / "checkpoints")
    path = next((checkpoints / NAME).glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    said = refused(capsys, "export", checkpoints, tmp_path / "folder", "--no-verify", "--tokenizer", "none")
    assert f"{path.name} is not as saved" in said


def test_what_the_model_cannot_express(made, tmp_path, capsys):
    argv = [*UNTIED, "--rotary-percent", "0.5", "--moe-router-num-groups", "2", "--moe-router-group-topk", "1"]
    said = refused(capsys, "export", made(*argv), tmp_path / "folder", "--no-verify", "--tokenizer", "none")
    assert "--rotary-percent 0.5" in said and "--moe-router-group-topk 1" in said


def test_no_tokenizer(made, tmp_path, capsys):
    said = refused(capsys, "export", made(*UNTIED, *GRU), tmp_path / "folder", "--no-verify")
    assert "--tokenizer none" in said
    said = refused(capsys, "export", made(*UNTIED, *GRU), tmp_path / "folder", "--no-verify", "--tokenizer", "missing")
    assert "missing is missing" in said and not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["export", "import"])
def test_what_exists_stays(made, exported, tmp_path, capsys, command):
    (tmp_path / "there").mkdir()
    what = made(*UNTIED, *GRU) if command == "export" else exported
    assert "there exists" in refused(capsys, command, what, tmp_path / "there")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--max-shard-size", "4 bananas"], "'4 bananas' is no size"),
        (["--ckpt-step", "0"], "--ckpt-step 0"),
        (["--ckpt-step", "5"], "complete ones: 7"),
        (["--run", "nowhere"], "--run nowhere: no such folder"),
    ],
)
def test_options(made, tmp_path, capsys, words, expected):
    assert expected in refused(capsys, "export", made(*UNTIED, *GRU), tmp_path / "folder", "--no-verify", *words)


@pytest.mark.parametrize("command", ["export", "import"])
def test_somebody_elses_folder_is_not_emptied(made, exported, tmp_path, capsys, command):
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis").write_text("mine")
    what = made(*UNTIED, *GRU) if command == "export" else exported
    assert "new.partial exists and is not" in refused(capsys, command, what, tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis").read_text() == "mine"


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_full_disk(made, exported, tmp_path, capsys, command):
    if not full.mount(tmp_path / "disk"):
        pytest.skip("mounting a small file system takes root")
    try:
        full.fill(tmp_path / "disk", 40_000)
        what = made(*UNTIED, *GRU) if command == "export" else exported
        more = ["--no-verify", "--tokenizer", "none"] if command == "export" else []
        said = refused(capsys, command, what, tmp_path / "disk" / "new", *more)
        assert "the disk is full (" in said and not (tmp_path / "disk" / "new").exists()
    finally:
        full.unmount(tmp_path / "disk")
