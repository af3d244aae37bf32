"""A text with everything that is hard about text, and tiny SentencePiece models trained on it."""

import random
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests import forked


@pytest.fixture(scope="session")
def text() -> str:
    """Some 30 kB: short and long lines, blank lines, runs of spaces, tabs, characters of one to four bytes."""
    rng = random.Random(0)
    words = ["the", "of", "naïve", "Æther", "日本語", "🙂🙃", "x" * 40, "{{ref|1}}", "tab\there", "two  spaces", "end."]
    lines = [" ".join(rng.choices(words, k=rng.randrange(12))) for _ in range(600)]
    lines[5:5] = ["", "", "  indented", "trailing  ", "", " ".join(rng.choices(words, k=400)), "z" * 700]
    return "\n".join(lines) + "\n"


MODELS = {
    # as Llama's: gives back every character
    "exact": dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        vocab_size=400,
    ),
    # as Gemma's: also pieces for several line breaks, and no prefix at the start
    "breaks": dict(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n\n", "\n\n\n"],
        vocab_size=400,
    ),
    # the library's defaults, with and without bytes
    "fallback": dict(model_type="bpe", byte_fallback=True, vocab_size=400),
    "default": dict(model_type="unigram", vocab_size=60),
}


@pytest.fixture(scope="session")
def models(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import sentencepiece

    folder = tmp_path_factory.mktemp("models")
    for name, options in MODELS.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_prefix=str(folder / name),
            character_coverage=1.0,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    return {name: folder / f"{name}.model" for name in MODELS}


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes that have Megatron imported already, forked from one that has no threads."""
    return forked.context()
