"""Megatron -> Hugging Face -> Megatron -> Hugging Face: every bit, every key, and the same function in Megatron."""

import json
from pathlib import Path

import pytest
import torch

from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.folder.checksums import CHECKSUMS
from rmoe_megablocks.conversion.folder.reading import Folder
from rmoe_megablocks.conversion.folder.shards import PADDING
from rmoe_megablocks.conversion.importing import import_folder
from rmoe_megablocks.megatron.checkpoints import compatibility, files
from rmoe_megablocks.torch_dist.reading import Reader
from tests.conversion import made as models
from tests.conversion.cells import ALL_CELLS, CELLS, FEW

PLAIN = Options(verify=False, tokenizer="none")


def written(made, tmp_path: Path, *argv: str, options: Options = PLAIN) -> tuple[Path, Path, Path]:
    """(checkpoints, folder, checkpoints again)"""
    checkpoints = made(*argv)
    export(checkpoints, tmp_path / "folder", options)
    import_folder(tmp_path / "folder", tmp_path / "again")
    return checkpoints, tmp_path / "folder", tmp_path / "again"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = Reader(checkpoint)
    return {name: reader.read(name) for name in reader.tensors}


@pytest.mark.parametrize("cell", CELLS)
def test_every_bit_comes_back(made, tmp_path, cell):
    checkpoints, folder, again = written(
        made, tmp_path, *CELLS[cell], options=Options(verify=False, tokenizer="none", max_shard_size=30_000)
    )
    ours, theirs = tensors(again / "release"), tensors(checkpoints / f"iter_{models.ITERATION:07d}")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
    export(again, tmp_path / "twice", Options(verify=False, tokenizer="none", max_shard_size=30_000))
    first, second = ((path / CHECKSUMS).read_text().splitlines() for path in (folder, tmp_path / "twice"))
    cards = ("README.md",)  # names the folder and the iteration
    assert [line for line in first if not line.endswith(cards)] == [line for line in second if not line.endswith(cards)]
    assert len(list(folder.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("cell", FEW if ALL_CELLS else FEW[:1])
def test_megatron_asks_for_nothing_that_is_not_there(made, tmp_path, cell):
    """It loads what was written, extra-state entries included, and computes the same loss and gradients."""
    checkpoints, _, again = written(made, tmp_path, *CELLS[cell])
    losses, gradients = [], []
    for checkpoint in (checkpoints / f"iter_{models.ITERATION:07d}", again / "release"):
        model, _ = models.build(*CELLS[cell])
        models.load(model, checkpoint)
        ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(3))
        positions = torch.arange(16).expand(2, 16)
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).float().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_what_is_written_passes_the_checks_of_a_start(made, tmp_path):
    _, _, again = written(made, tmp_path, *CELLS["stacked, untied, gru"])
    choice = files.choose(again)
    state = compatibility.saved_state(again)
    assert choice.iteration == 0 and state["args"].moe_router_type == "gru"
    assert state["args"].moe_router_rnn_hidden_size == 8 and state["args"].no_save_optim


def test_padding_is_left_out_of_the_model_and_kept_beside_it(made, tmp_path):
    cell = "linear, null experts, gated shared expert, padded vocabulary, MegaBlocks"
    checkpoints, folder, again = written(made, tmp_path, *CELLS[cell])
    opened = Folder(folder)
    assert opened.tensors["lm_head.weight"][0] == (256, 32) and opened.config["vocab_size"] == 256
    (folder / PADDING).unlink()
    (folder / CHECKSUMS).unlink()
    import_folder(folder, tmp_path / "unpadded")
    assert list(Reader(tmp_path / "unpadded" / "release").tensors["output_layer.weight"].size) == [256, 32]
    assert list(Reader(again / "release").tensors["output_layer.weight"].size) == [288, 32]
    model, _ = models.build(*CELLS[cell])  # pads its vocabulary to 288 rows, and loads 256
    models.load(model, tmp_path / "unpadded" / "release")
    assert torch.equal(model.output_layer.weight[:256], opened.read("lm_head.weight"))


def test_the_other_name_of_the_norm_before_experts(made, tmp_path):
    """As Transformer Engine's layers write and read it: accepted, and written where it was asked for."""
    _, folder, again = written(made, tmp_path, *CELLS["stacked, untied, gru"])
    import_folder(folder, tmp_path / "engine", transformer_engine=True)
    ours, theirs = tensors(tmp_path / "engine" / "release"), tensors(again / "release")
    moved = ours.pop("decoder.layers.pre_mlp_layernorm.weight")
    assert torch.equal(moved, theirs.pop("decoder.layers.mlp.linear_fc1.layer_norm_weight"))
    assert ours.keys() == theirs.keys()
    export(tmp_path / "engine", tmp_path / "twice", PLAIN)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_multi_token_prediction_is_named(made, tmp_path):
    checkpoints = made(*CELLS["stacked, untied, gru"], "--mtp-num-layers", "1")
    said = export(checkpoints, tmp_path / "folder", PLAIN)
    names = [name for name in Reader(checkpoints / f"iter_{models.ITERATION:07d}").tensors if name.startswith("mtp.")]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert len(names) > 5 and all(name in said[-1] and f"`{name}`" in card for name in names)
    assert not [name for name in Folder(tmp_path / "folder").tensors if "mtp" in name]


def test_precisions(made, tmp_path):
    _, folder, _ = written(made, tmp_path, *CELLS["bf16, expert bias in fp32, sigmoid"])
    dtypes = {name: dtype for name, (_, dtype) in Folder(folder).tensors.items()}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if name.endswith("expert_bias")} == {torch.float32}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["router_dtype"] == "float32"
    assert config["router_topk_scaling_factor"] == 2.5 and config["rms_norm_eps"] == 1e-5


def test_a_bin_file_is_as_good(made, tmp_path):
    checkpoints, folder, again = written(made, tmp_path, *CELLS["stacked, untied, gru"])
    opened = Folder(folder)
    torch.save({name: opened.read(name) for name in opened.tensors}, folder / "pytorch_model.bin")
    for path in (*folder.glob("*.safetensors"), folder / CHECKSUMS):
        path.unlink()
    import_folder(folder, tmp_path / "of_bin")
    ours, theirs = tensors(tmp_path / "of_bin" / "release"), tensors(again / "release")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
