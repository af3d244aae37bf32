"""The written model computes what Megatron's does, in every cell; a wrong convention is seen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rmoe_megablocks.huggingface  # noqa: F401  registers the model type
from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.importing import import_folder
from rmoe_megablocks.conversion.verification.comparison import judge
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.torch_dist.reading import Reader
from tests.conversion import made as models
from tests.conversion.cells import ALL_CELLS, CELLS, DENSE_FIRST, FEW, GROUPED, GRU, UNTIED

IDS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def of_megatron(checkpoints: Path, argv: list[str]):
    model, _ = models.build(*(word for word in argv if word != "--bf16"))  # the same weights, computed with in fp32
    models.load(model, checkpoints / f"iter_{models.ITERATION:07d}")
    return model.eval()(IDS, torch.arange(16).expand(2, 16), None)[..., :256].numpy()


@torch.no_grad()
def of_huggingface(folder: Path):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    return model.eval()(IDS).logits.numpy()


@pytest.mark.parametrize("cell", FEW)
def test_logits(made, tmp_path, cell):
    export(made(*CELLS[cell]), tmp_path / "folder", Options(verify=False, tokenizer="none"))
    theirs = of_megatron(made(*CELLS[cell]), CELLS[cell])
    assert theirs.std() > 0.05
    assert "100.0% of the tokens" in judge(theirs, of_huggingface(tmp_path / "folder"))


def swap_gate_and_up(tensors):
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        tensors[name] = torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1).contiguous()


def mix_up_heads(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].view(2, 2, 12, -1).transpose(0, 1).reshape(tensors[name].shape).contiguous()


def swap_gates_of_the_gru(tensors):
    name = "model.shared_router.weight_ih"
    first, second, third = tensors[name].chunk(3)
    tensors[name] = torch.cat((second, first, third))


FAULTS = [mix_up_heads, swap_gate_and_up, swap_gates_of_the_gru]


@pytest.mark.parametrize("fault", FAULTS if ALL_CELLS else FAULTS[:1])
def test_a_wrong_convention_is_refused(made, tmp_path, fault):
    argv = [*UNTIED, *DENSE_FIRST, *GROUPED, *GRU]
    export(made(*argv), tmp_path / "folder", Options(verify=False, tokenizer="none"))
    weights = tmp_path / "folder" / "model.safetensors"
    tensors = load_file(weights)
    fault(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="does not compute what the checkpoint does"):
        judge(of_megatron(made(*argv), argv), of_huggingface(tmp_path / "folder"))


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_wrong_constant_is_refused(made, tmp_path, key):
    argv = [*UNTIED, *DENSE_FIRST, *GROUPED, *GRU]
    export(made(*argv), tmp_path / "folder", Options(verify=False, tokenizer="none"))
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text())
    place = config["rope_parameters"] if key in config["rope_parameters"] else config
    place[key] = {"rope_theta": 500.0, "rms_norm_eps": 1e-6}[key]
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not compute what the checkpoint does"):
        judge(of_megatron(made(*argv), argv), of_huggingface(tmp_path / "folder"))


@pytest.mark.parametrize("cell", FEW)
def test_what_transformers_saves_is_imported(made, tmp_path, cell):
    """A fine-tuned model comes back: here one with its norm doubled, in the precision that it was stored in."""
    checkpoints = made(*CELLS[cell])
    export(checkpoints, tmp_path / "folder", Options(verify=False, tokenizer="none"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    import_folder(tmp_path / "tuned", tmp_path / "again")
    before = Reader(checkpoints / f"iter_{models.ITERATION:07d}")
    after = Reader(tmp_path / "again" / "release")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        factor = 2 if name == "decoder.final_layernorm.weight" else 1
        found = after.read(name)  # without the rows that Megatron had added to the vocabulary: the library saves none
        assert torch.equal(found, before.read(name)[: len(found)] * factor), name
        assert len(found) == len(before.read(name)) or name.endswith(("word_embeddings.weight", "output_layer.weight"))


@pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1")
def test_the_command_measures_it(made, tmp_path):
    checkpoints = shutil.copytree(made(*UNTIED, *GRU), tmp_path / "checkpoints")
    said = export(checkpoints, tmp_path / "folder", Options(tokenizer="bytes"))[-1]
    assert "100.0% of the tokens" in said and said in (tmp_path / "folder" / "README.md").read_text()
