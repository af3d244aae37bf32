"""The released layout, from Megatron and back: every bit, Megatron's logits, and what it cannot say is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rmoe_megablocks import cli
from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.importing import import_folder
from tests.conversion import made as models
from tests.conversion.cells import ALL_CELLS, DENSE_FIRST, GRU, SHARED, UNTIED
from tests.conversion.test_round_trip import tensors

LAYOUT = Options(verify=False, tokenizer="none", layout="llama_moe_rnn", max_shard_size=30_000)
CELLS = {
    "gru": [*UNTIED, *GRU],
    "gru behind a dense layer, shared expert, tied": [*DENSE_FIRST, *SHARED, *GRU],
    "rnn": [*UNTIED, "--moe-router-type", "rnn", "--moe-router-rnn-hidden-size", "8"],
    "linear, grouped queries": [*UNTIED, "--group-query-attention", "--num-query-groups", "2"],
}


@pytest.mark.parametrize("cell", CELLS)
def test_there_and_back(made, tmp_path, cell):
    checkpoints = made(*CELLS[cell])
    folder = tmp_path / "released"
    export(checkpoints, folder, LAYOUT)
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == "llama_moe_rnn" and not list(folder.glob("*.py"))
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert ("model.rnn_router.weight_hr" in names) == ("gru" in cell)
    import_folder(folder, tmp_path / "again")
    ours, theirs = tensors(tmp_path / "again" / "release"), tensors(checkpoints / f"iter_{models.ITERATION:07d}")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("cell", list(CELLS)[:2])
def test_logits_are_those_of_the_other_layout(made, tmp_path, cell):
    """Which are Megatron's: test_logits.py. A wrong gate, or gate and up the wrong way round, moves them."""
    checkpoints = made(*CELLS[cell])
    export(checkpoints, tmp_path / "released", LAYOUT)
    export(checkpoints, tmp_path / "rmoe", Options(verify=False, tokenizer="none"))
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n)(ids).logits for n in ("released", "rmoe"))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert one.std() > 0.01


@pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1: starts two processes")
def test_export_compares_logits_with_megatrons(made, tmp_path):
    lines = export(made(*CELLS["gru"]), tmp_path / "folder", Options(tokenizer="none", layout="llama_moe_rnn"))
    assert "differ from Megatron's by at most" in lines[-1]


@pytest.mark.parametrize(
    ("argv", "refused"),
    [
        (["--moe-router-type", "mlp"], "router of type mlp"),
        ([*GRU, "--moe-router-rnn-bias"], "--moe-router-rnn-bias True"),
        ([*GRU, "--moe-router-residual", "0.5"], "--moe-router-residual 0.5"),
        ([*GRU, "--moe-router-share-head", "all"], "--moe-router-share-head"),
        ([*UNTIED, "--moe-null-experts", "2"], "num_null_experts 2"),
        ([*UNTIED, "--qk-layernorm"], "qk_norm True"),
        ([*UNTIED, "--moe-layer-freq", "[1,0,1]"], "dense layers behind layers with experts"),
        ([*UNTIED, "--moe-router-score-function", "sigmoid"], "router_score_function 'sigmoid'"),
        ([*UNTIED, "--kv-channels", "12"], "head_dim 12 beside 4 heads"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(made, tmp_path, capsys, argv, refused):
    checkpoints = made(*argv)
    capsys.readouterr()
    typed = ["export", str(checkpoints), str(tmp_path / "folder"), "--layout", "llama_moe_rnn", "--tokenizer", "none"]
    assert cli.main(typed) == 2
    told = capsys.readouterr().err.strip()
    assert f"--layout llama_moe_rnn has no {refused}" in told and len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"add_moe_bias": True}, "add_moe_bias of a llama_moe_rnn model"),
        ({"moe_num_layers": None}, "moe_num_layers of a llama_moe_rnn model must be a whole number, got None"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"moe_router_rnn_hidden_size": 9}, "config.json makes it"),
        ({"num_local_experts": 5}, "experts.4.w1.weight is missing"),
        (
            {"add_moe_share_expert": True, "moe_share_expert_intermediate_size": 8, "share_weight": 0.5},
            "moe_shared_expert_scaling 0.5",
        ),
    ],
)
def test_what_cannot_be_imported_is_told(made, tmp_path, capsys, change, line):
    export(made(*CELLS["gru"]), tmp_path / "folder", LAYOUT)
    file = tmp_path / "folder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    capsys.readouterr()
    assert cli.main(["import", str(tmp_path / "folder"), str(tmp_path / "checkpoint")]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told and len(told.splitlines()) == 1 and not (tmp_path / "checkpoint").exists()
