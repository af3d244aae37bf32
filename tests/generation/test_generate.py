"""``rmoe generate``: the tokens of transformers' own generate, and the choices of the model's own routers."""

import hashlib
import importlib.util
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rmoe_megablocks import cli
from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.generation import routing
from rmoe_megablocks.huggingface import RmoeForCausalLM
from rmoe_megablocks.huggingface.layers.moe import choose
from tests.evaluation.made import folder, refused
from tests.huggingface.built import E, M, model, routers, tokens

PROMPT = "The cat"
NEW = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("made") / "hf", max_position_embeddings=64)


def generate(capsys, *words) -> str:
    assert cli.main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def generated(monkeypatch) -> list[list[int]]:
    """The ids of each call of generate()."""
    ids, own = [], RmoeForCausalLM.generate

    def generate(self, *args, **options):
        whole_BS = own(self, *args, **options)
        ids.append(whole_BS[0].tolist())
        return whole_BS

    monkeypatch.setattr(RmoeForCausalLM, "generate", generate)
    return ids


def text(ids) -> str:
    return bytes(ids).decode(errors="replace")


def theirs(made: Path, prompt: bytes = PROMPT.encode(), **options) -> list[int]:
    loaded = RmoeForCausalLM.from_pretrained(made).eval()
    ids = torch.tensor([list(prompt)])
    return loaded.generate(ids, max_new_tokens=NEW, pad_token_id=0, **options)[0].tolist()


@pytest.mark.parametrize("words", [[], ["--greedy"]])
def test_greedy(made, capsys, generated, words):
    expected = theirs(made, do_sample=False)
    assert len(set(expected[len(PROMPT) :])) > 3  # not one token over and over, which any mistake would give, too
    assert generate(capsys, made, PROMPT, "--max-new-tokens", NEW, *words) == text(expected) + "\n"
    assert generated == [expected, expected]  # several bytes can look alike in a text


@pytest.mark.parametrize(
    "words, options",
    [
        ([], dict(top_k=0, top_p=1.0, temperature=1.0)),
        (["--top-k", 3], dict(top_k=3, top_p=1.0, temperature=1.0)),
        (["--top-p", 0.6, "--temperature", 0.7], dict(top_k=0, top_p=0.6, temperature=0.7)),
    ],
)
def test_sampling(made, capsys, generated, words, options):
    torch.manual_seed(5)
    expected = theirs(made, do_sample=True, **options)
    found = generate(capsys, made, PROMPT, "--max-new-tokens", NEW, "--seed", 5, *words)
    assert found == text(expected) + "\n" and generated == [expected, expected]
    assert expected != theirs(made, do_sample=False)


def test_standard_input(made, capsys, monkeypatch):
    raw = b"a\xffb\n"  # any bytes
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    assert generate(capsys, made, "-", "--max-new-tokens", NEW) == text(theirs(made, raw, do_sample=False)) + "\n"


@pytest.mark.parametrize("changes", [{}, {"num_null_experts": M}], ids=["real", "null"])
@torch.no_grad()
def test_the_choices_are_the_models_own(changes):
    built, ids = model(**changes), tokens(1)
    found = routing.record(built, ids)
    logits = built(ids, output_router_logits=True).router_logits
    assert found.layers == (1, 2, 4) and found.experts.shape[0] == len(logits) == len(routers(built))
    for experts_TK, logits_TN in zip(found.experts, logits, strict=True):
        chosen_TK = logits_TN.topk(experts_TK.shape[1], dim=-1).indices
        assert (experts_TK == torch.where(chosen_TK < E, chosen_TK, -1)).all()
        real = experts_TK >= 0
        assert (experts_TK[real] == choose(logits_TN, built.config)[1][real]).all()
    assert (found.experts == -1).any() == bool(changes)


def test_the_table():
    choices = routing.Choices((1, 3), torch.tensor([[[0, 12], [3, -1], [1, 2]], [[5, 6], [7, 8], [9, 10]]]))
    assert routing.table(choices, ["a", "\n", "bc"], prompt=1).splitlines() == [
        "token  L1    L3",
        "'a'    0,12  5,6",
        "-----------------",
        r"'\n'   3,-   7,8",
        "'bc'   1,2   9,10",
    ]


@pytest.mark.parametrize("width", [80, 40])
def test_a_table_of_many_layers_wraps(width):
    layers, names = 24, ["x" * 40, "y"]
    experts = torch.randint(64, (layers, 2, 4), generator=torch.Generator().manual_seed(0))
    lines = routing.table(routing.Choices(tuple(range(layers)), experts), names, 2, width).splitlines()
    assert max(map(len, lines)) <= width
    blocks = "\n".join(lines).split("\n\n")
    rows = [[cell for block in blocks for cell in block.splitlines()[row].split()[1:]] for row in range(3)]
    assert rows[0] == [f"L{layer}" for layer in range(layers)]
    assert [[list(map(int, cell.split(","))) for cell in row] for row in rows[1:]] == experts.transpose(0, 1).tolist()


def test_show_routing(made, capsys):
    out = generate(capsys, made, PROMPT, "--max-new-tokens", 3, "--show-routing")
    ids = theirs(made, do_sample=False)[: len(PROMPT) + 3]
    found = routing.record(RmoeForCausalLM.from_pretrained(made).eval(), torch.tensor([ids]))
    names = [chr(token) if token < 128 else bytes([token]) for token in ids]
    assert out == f"{text(ids)}\n\n{routing.table(found, names, len(PROMPT))}\n"


@pytest.mark.parametrize(
    "words, expected",
    [
        ([""], "the prompt is empty"),
        (["a", "--max-new-tokens", 64], "--max-new-tokens 63 is the most"),
        (["a" * 64], "made for 64 in all: shorten it"),
        (["a", "--max-new-tokens", 0], "--max-new-tokens 0"),
        (["a", "--temperature", 0], "--temperature 0"),
        (["a", "--top-p", 1.5], "--top-p 1.5"),
        (["a", "--greedy", "--seed", 1], "leave out --seed"),
        (["a", "--typical", 1], "unrecognized arguments: --typical 1"),
    ],
)
def test_bad_input(made, capsys, words, expected):
    assert expected in refused(capsys, "generate", made, *words)


def test_routing_of_another_model(tmp_path, capsys):
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    theirs.save_pretrained(tmp_path)
    tokenizers._bytes(None).save_pretrained(tmp_path)
    assert "has no router of this package (gpt2)" in refused(capsys, "generate", tmp_path, "a", "--show-routing")


def test_no_folder(tmp_path, capsys):
    assert "no such folder" in refused(capsys, "generate", tmp_path / "nowhere", "a")
    assert "has no config.json" in refused(capsys, "generate", tmp_path, "a")


def test_a_damaged_folder(made, tmp_path, capsys):
    damaged = shutil.copytree(made, tmp_path / "damaged")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    assert f"{damaged} cannot be loaded: " in refused(capsys, "generate", damaged, "a")
    (damaged / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  model.safetensors\n")
    assert "model.safetensors is not as SHA256SUMS says" in refused(capsys, "generate", damaged, "a")


@pytest.mark.parametrize("package", ["transformers", "safetensors"])
def test_no_extra(made, capsys, monkeypatch, package):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else there(name, *rest)
    )
    for words in (["generate", made, "a"], ["eval", made, "--data", made / "config.json"]):
        assert f"{package} is not installed: pip install 'rmoe-megablocks[hf]'" in refused(capsys, *words)
