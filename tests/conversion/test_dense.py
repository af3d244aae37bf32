"""A dense Llama-style model becomes a mixture of experts: the same function where all experts are taken alike."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rmoe_megablocks import cli
from rmoe_megablocks.conversion.dense import splitting
from rmoe_megablocks.conversion.exporting import Options, export
from rmoe_megablocks.conversion.folder.reading import Folder
from rmoe_megablocks.huggingface import RmoeForCausalLM
from tests.conversion.cells import ALL_CELLS
from tests.conversion.test_training import losses

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
DENSE = {
    "llama": LlamaConfig(**SIZES, rope_theta=5000.0, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
}


def dense(place, kind="llama", **changes):
    """A folder with weights large enough that nothing is lost in rounding."""
    config = type(DENSE[kind])(**(DENSE[kind].to_dict() | changes))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    model.save_pretrained(place)
    return place


def split(tmp_path, folder, *typed):
    """The folder of the exported result."""
    assert cli.main(["import", str(folder), str(tmp_path / "checkpoint"), *typed]) == 0
    export(tmp_path / "checkpoint", tmp_path / "moe", Options(verify=False, tokenizer="none"))
    return tmp_path / "moe"


def logits(model):
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return dense(tmp_path_factory.mktemp("dense") / "llama")


CELLS = [
    *((kind, "random", "linear") for kind in DENSE),
    ("llama", "clustering", "gru"),
    ("qwen2", "clustering", "mlp"),
]


@pytest.mark.parametrize(("kind", "method", "router"), CELLS)
def test_all_experts_alike_are_the_dense_model(tmp_path, kind, method, router):
    folder = dense(tmp_path / "dense", kind)
    state = ["--moe-router-rnn-hidden-size", "6"] if router == "gru" else []
    typed = ["--split-ffn", "4", "--split-topk", "4", "--split-scale", "4", "--split-method", method]
    moe = split(tmp_path, folder, *typed, "--moe-router-type", router, *state)
    model = RmoeForCausalLM.from_pretrained(moe)
    ours, truth = logits(model), logits(AutoModelForCausalLM.from_pretrained(folder))
    assert truth.std() > 1 and (ours - truth).abs().max() > 1e-3  # gates that are not quite alike
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model), truth, atol=2e-5, rtol=1e-5)


def test_the_scale_is_the_papers_and_the_router_is_drawn(tmp_path):
    folder = dense(tmp_path / "dense")
    moe = split(tmp_path, folder, "--split-ffn", "8", "--split-topk", "2", "--moe-router-type", "gru")
    before, after = Folder(folder), Folder(moe)
    assert after.config["num_experts"] == 8 and after.config["num_experts_per_tok"] == 2
    for layer in range(2):
        place = f"model.layers.{layer}.mlp."
        gates, ups = after.read(f"{place}experts.gate_up_proj").chunk(2, dim=1)
        downs = after.read(f"{place}experts.down_proj").transpose(1, 2)
        found = torch.cat((gates, ups, downs / 4), dim=2).flatten(0, 1)
        parts = [before.read(f"{place}{part}_proj.weight") for part in ("gate", "up", "down")]
        expected = torch.cat((*parts[:2], parts[2].T), dim=1)
        order = lambda rows: rows[rows[:, 0].argsort()]  # noqa: E731
        assert torch.equal(order(found), order(expected))  # every neuron in one expert, whole
        drawn = after.read(f"{place}router.layer.router")
        assert drawn.shape == (8, 128) and 0.015 < drawn.std() < 0.025
    first, second = (after.read(f"model.layers.{layer}.mlp.router.layer.router") for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.skipif(not ALL_CELLS, reason="RMOE_TEST_ALL_CELLS=1: trains in a process of its own")
def test_pre_training_goes_on(tmp_path):
    folder = dense(tmp_path / "dense", vocab_size=256, max_position_embeddings=64, tie_word_embeddings=False)
    typed = ["--split-ffn", "4", "--moe-router-type", "gru", "--moe-router-rnn-hidden-size", "16"]
    assert cli.main(["import", str(folder), str(tmp_path / "checkpoint"), *typed]) == 0
    sizes = ["--num-layers", "2", "--hidden-size", "32", "--num-experts", "4", "--moe-router-topk", "2"]
    sizes += ["--moe-ffn-hidden-size", "12", "--ffn-hidden-size", "48", "--moe-router-rnn-hidden-size", "16"]
    sizes += [
        "--group-query-attention",
        "--num-query-groups",
        "2",
        "--num-attention-heads",
        "4",
        "--rotary-base",
        "5000",
    ]
    sizes += ["--seq-length", "64", "--max-position-embeddings", "64", "--norm-epsilon", "1e-6"]
    found = losses(tmp_path, "on", "--load", str(tmp_path / "checkpoint"), "--finetune", *sizes)
    fresh = losses(tmp_path, "fresh", *sizes)
    assert len(found) == 4 and found[3] < found[0] and abs(found[0] - fresh[0]) > 0.1  # large weights: far from uniform


def test_neurons_that_are_alike_go_together_and_experts_are_of_one_size():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 5
    of = torch.arange(40) % 4
    rows = centres[of] + torch.randn(40, 16, generator=generator) * 0.1
    found = splitting.split(rows, 4, "clustering", 0)
    assert found.shape == (4, 10) and all(len(of[expert].unique()) == 1 for expert in found)
    lopsided = torch.cat((centres[:1].expand(37, -1), centres[1:])) + torch.randn(40, 16, generator=generator) * 0.1
    assert sorted(splitting.split(lopsided, 4, "clustering", 0).flatten().tolist()) == list(range(40))
    ones, others = (splitting.split(rows, 4, "random", seed) for seed in (0, 1))
    assert torch.equal(ones, splitting.split(rows, 4, "random", 0)) and not torch.equal(ones, others)


@pytest.mark.parametrize(
    ("changes", "typed", "line"),
    [
        ({}, ["--split-ffn", "5"], "have 48 neurons, which that does not divide"),
        ({}, ["--split-ffn", "1"], "--split-ffn 1: expected at least 2 experts"),
        ({}, ["--split-ffn", "4", "--split-topk", "5"], "--split-topk 5: expected 1 to 4"),
        ({}, ["--split-ffn", "4", "--split-scale", "0"], "--split-scale 0: expected a number above 0"),
        ({}, ["--split-topk", "2"], "--split-topk means nothing without --split-ffn"),
        ({}, ["--moe-router-type", "gru"], "--moe-router-type means nothing without --split-ffn"),
        ({}, ["--split-ffn", "4", "--num-layers", "3"], "unrecognized arguments: --num-layers 3"),
        ({}, ["--split-ffn", "4", "--moe-router-rnn-hidden-size", "8"], "is no argument of --moe-router-type linear"),
        ({"attention_bias": True}, ["--split-ffn", "4"], "attention_bias is True; the result could only have False"),
        ({"hidden_act": "gelu"}, ["--split-ffn", "4"], "hidden_act is 'gelu'; the result could only have 'silu'"),
        ({"model_type": "gpt2"}, ["--split-ffn", "4"], "is 'gpt2'"),
        ({"intermediate_size": 64}, ["--split-ffn", "4"], "mlp.gate_proj.weight is [48, 32], config.json makes it"),
        ({"num_hidden_layers": 1}, ["--split-ffn", "4"], "has no place in a llama model"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            ["--split-ffn", "4"],
            "rope_parameters must be of rope_type default",
        ),
    ],
)
def test_what_cannot_be_split_is_told_in_one_line(tmp_path, plain, capsys, changes, typed, line):
    folder = tmp_path / "dense"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(["import", str(folder), str(tmp_path / "checkpoint"), *typed]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told and len(told.splitlines()) == 1
    assert not list(tmp_path.glob("checkpoint*"))
