"""What is written encodes as the data was prepared: bytes, SentencePiece models of several kinds."""

import os
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoTokenizer

from rmoe_megablocks.conversion.folder import tokenizers
from rmoe_megablocks.data.embedded import embedded_corpus
from rmoe_megablocks.errors import UsageError

TEXTS = (
    "",
    "plain",
    " two  spaces ",
    "a\nb\t\r\n",
    "Grüße, 日本語, 🙂 e\u0301",
    "<|endoftext|>x",
    embedded_corpus()[:3000].decode(),
)


def test_bytes(tmp_path):
    tokenizers.write(tokenizers.Tokenizer("bytes", None, 256, None), tmp_path, 64)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert len(fast) == 256 and fast.model_max_length == 64
    for text in TEXTS:
        ids = fast.encode(text)
        assert ids == list(text.encode()) and fast.decode(ids) == text
    any_bytes = os.urandom(512) + bytes(range(256))
    assert bytes(list(any_bytes)) == any_bytes  # an id is a byte: nothing to encode
    assert fast.convert_tokens_to_ids(fast.convert_ids_to_tokens(list(any_bytes))) == list(any_bytes)


def test_bytes_with_an_end_of_document(tmp_path):
    ids = tokenizers.write(tokenizers.Tokenizer("bytes", None, 257, 256), tmp_path, 64)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert ids == {"eos_token_id": 256} and len(fast) == 257 and fast.eos_token_id == 256


of_sentencepiece = pytest.mark.skipif(
    Version(transformers.__version__) < Version(tokenizers.SENTENCEPIECE_SINCE),
    reason=f"needs transformers {tokenizers.SENTENCEPIECE_SINCE}",
)


@pytest.fixture(scope="module", params=["unigram", "bpe", "bpe, identity, byte fallback"])
def model(request, tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("model")
    (folder / "text").write_bytes(embedded_corpus()[:200_000])
    kind, *more = request.param.split(", ")
    options = {"normalization_rule_name": "identity", "byte_fallback": True} if more else {}
    if more:
        options |= {"remove_extra_whitespaces": False, "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=600, model_type=kind, minloglevel=2,
        character_coverage=0.98, num_threads=1, **options,
    )  # fmt: skip
    return folder / "m.model"


@of_sentencepiece
def test_sentencepiece(model, tmp_path):
    import sentencepiece

    slow = sentencepiece.SentencePieceProcessor(model_file=str(model))
    chosen = tokenizers.choose(None, str(model))
    assert (chosen.kind, chosen.vocab_size) == ("sentencepiece", 600)
    tokenizers.write(chosen, tmp_path, 64)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    lines = embedded_corpus()[200_000:230_000].decode(errors="ignore").splitlines()
    different = [line for line in lines if fast.encode(line, add_special_tokens=False) != slow.encode(line)]
    assert len(lines) > 100 and not different, different[:3]
    assert fast.eos_token_id == slow.eos_id() and fast.bos_token_id == slow.bos_id()


@of_sentencepiece
def test_a_form_that_differs_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "_fast", lambda path: tokenizers._bytes(None))
    with pytest.raises(UsageError, match="as a fast tokenizer it gives"):
        tokenizers.write(tokenizers.choose(None, str(model)), tmp_path, 64)


def test_older_releases_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    made = tokenizers.choose(None, str(model))
    with pytest.raises(UsageError, match="needs transformers 5.24, here is 5.23.0"):
        tokenizers.write(made, tmp_path, 64)
