"""Texts and datasets of a SentencePiece model: the same ids as the model's own, or a refusal."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from rmoe_megablocks import cli, data
from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.data import embedded_corpus
from rmoe_megablocks.evaluation import texts
from tests.evaluation.made import folder, refused

LINES = embedded_corpus()[40_000:44_000].decode(errors="ignore")


def trained(place: Path, start: int) -> Path:
    place.mkdir()
    (place / "text").write_bytes(embedded_corpus()[start : start + 30_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text"), model_prefix=str(place / "m"), vocab_size=400, model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", byte_fallback=True, remove_extra_whitespaces=False, split_digits=True,
        character_coverage=0.98, num_threads=1,
    )  # fmt: skip
    return place / "m.model"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a model's folder, its SentencePiece model, a dataset of it)"""
    place = tmp_path_factory.mktemp("made")
    pieces = trained(place / "pieces", 0)
    folder(place / "hf", vocab_size=400)
    tokenizers.write(tokenizers.choose(None, str(pieces)), place / "hf", 16)
    (place / "text").write_text(LINES)
    data.prepare(
        [place / "text"], place / "set", split="70%,10%,20%", tokenizer="sentencepiece", tokenizer_model=pieces
    )
    return place / "hf", pieces, place / "set"


@pytest.mark.parametrize("text", [LINES, "a <unk> b", " = A @-@ <unk> = \n </s> <s>x"])
def test_the_ids_of_a_text(made, tmp_path, text):
    """Special tokens that are spelt out are text."""
    (tmp_path / "text").write_text(text)
    fast = AutoTokenizer.from_pretrained(made[0])
    slow = sentencepiece.SentencePieceProcessor(model_file=str(made[1]))
    assert texts.of_file(tmp_path / "text", fast).tokens.tolist() == slow.encode(text)


def test_a_dataset(made, tmp_path, capsys):
    model, pieces, dataset = made
    words = ["eval", model, "--data", dataset, "--tokenizer-model", pieces, "--json", tmp_path / "result.json"]
    assert cli.main([str(word) for word in words]) == 0
    assert "words and characters are not known" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "result.json").read_text())
    split = data.DatasetMetadata.load(dataset).splits["test"]
    assert (result["of"] + 1, result["bytes"], result["words"]) == (split.tokens, split.bytes, None)
    assert result["word_perplexity"] is None and result["bits_per_byte"] > 0


def test_another_tokenizer(made, tmp_path, capsys):
    model, pieces, dataset = made
    assert "name that file with --tokenizer-model" in refused(capsys, "eval", model, "--data", dataset)
    other = trained(tmp_path / "other", 100_000)
    assert "sha256" in refused(capsys, "eval", model, "--data", dataset, "--tokenizer-model", other)
    of_bytes = folder(tmp_path / "bytes")
    assert "is another one" in refused(capsys, "eval", of_bytes, "--data", dataset, "--tokenizer-model", pieces)
    changed = shutil.copytree(model, tmp_path / "changed")
    tokenizers.write(tokenizers.choose(None, str(other)), changed, 16)
    said = refused(capsys, "eval", changed, "--data", dataset, "--tokenizer-model", pieces)
    assert "in the model's tokenizer" in said


def test_what_is_no_utf8(made, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"abc\xff")
    assert "not UTF-8 at byte 3" in refused(capsys, "eval", made[0], "--data", tmp_path / "text")
