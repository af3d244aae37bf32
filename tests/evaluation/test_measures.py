"""Figures of a text: counts, and the word perplexity of a unigram model in closed form."""

import gzip
import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmoe_megablocks.evaluation import texts
from rmoe_megablocks.evaluation.measures import Counts, count, figures
from rmoe_megablocks.evaluation.prediction import Processes, predict
from rmoe_megablocks.evaluation.windows import Windows

# as WikiText is distributed, at word level
EXCERPT = b""" \n = Gold dollar = \n \n The gold dollar was struck as a regular @-@ issue coin from 1849 to 1889 . \n
 The coin had three types over its lifetime , all designed by Mint Chief <unk> James B. Longacre . The Type 1 issue
 had the smallest diameter of any United States coin ever @-@ minted , at 13 @,@ 000 micrometers . \n"""


def wikitext() -> bytes:
    """RMOE_TEST_WIKITEXT names a whole file, as WikiText-2's test.txt.gz; otherwise an excerpt."""
    path = os.environ.get("RMOE_TEST_WIKITEXT")
    if path is None:
        return EXCERPT
    raw = Path(path).read_bytes()
    return gzip.decompress(raw) if path.endswith(".gz") else raw


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"a b\n\n c", Counts(7, 7, 3, 2)),
        ("Grüße 日本\n".encode(), Counts(15, 9, 2, 1)),
        ("ü🙂ü".encode()[1:-1], Counts(6, 2, 1, 0)),  # the first one begins before the text, the last one in it
        ("a日".encode()[:-1], Counts(3, 2, 1, 0)),
        (b"a\xffb c", Counts(5, None, 2, 0)),
        (b"\xa0\xa0\xa0\xa0", Counts(4, None, 1, 0)),
        (b" \n = A @-@ B <unk> = \n", Counts(22, 22, 6, 2)),
    ],
)
def test_count(text, expected):
    assert count(text) == expected


def test_figures_by_hand():
    """8 tokens of 16 bytes, 12 characters, 3 words and 1 end of line; 4 were predicted, with 2 bits each."""
    found = figures(4 * 2 * math.log(2), 4, 8, Counts(16, 12, 3, 1))
    assert found == pytest.approx(
        {
            "bits_per_byte": 1.0,
            "bits_per_character": 16 / 12,
            "nats_per_token": 2 * math.log(2),
            "token_perplexity": 4.0,
            "word_perplexity": 2**4,
            "word_perplexity_without_line_ends": 2 ** (16 / 3),
        }
    )


def test_what_is_not_known_or_too_large_has_no_figure():
    found = figures(1000.0, 1, 2, Counts(2))
    assert found["bits_per_byte"] > 1000 and found["nats_per_token"] == 1000
    assert {key for key, value in found.items() if value is None} == {
        *("bits_per_character", "token_perplexity", "word_perplexity", "word_perplexity_without_line_ends")
    }


def test_a_unigram_model_of_wikitext(tmp_path):
    raw = wikitext()
    (tmp_path / "wiki.test.tokens").write_bytes(raw)
    words = [word for line in raw.decode().splitlines() for word in (*line.split(), "<eos>")]
    counts = Counter(words)
    ids = {word: number for number, word in enumerate(counts)}

    fast = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.normalizer = normalizers.Replace(Regex("\n"), " <eos> ")
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
    text = texts.of_file(tmp_path / "wiki.test.tokens", tokenizer)
    assert [list(ids)[token] for token in text.tokens] == words
    assert (text.counts.words + text.counts.lines, text.unknown) == (len(words), 0)

    (tmp_path / "more").write_bytes(raw + b" nobody knows <unk> nobodys word \n")
    more = texts.of_file(tmp_path / "more", tokenizer)
    assert more.unknown == sum(word not in counts for word in ("nobody", "knows", "nobodys", "word"))
    assert f"{more.unknown} tokens stand for text" in more.notes[0]

    logits = torch.tensor([counts[word] / len(words) for word in ids], dtype=torch.float64).log()

    def model(input_ids, use_cache):
        return SimpleNamespace(logits=logits.float().expand(*input_ids.shape, -1))

    predicted = len(words) - 1
    done = predict(model, text.tokens, Windows(predicted, 128, 128), 4, Processes("cpu"))
    found = figures(done.nats, done.tokens, len(text.tokens), text.counts)
    closed = math.exp(-sum(math.log(counts[word] / len(words)) for word in words[1:]) / predicted)
    assert found["word_perplexity"] == pytest.approx(closed, rel=1e-5)
    assert found["token_perplexity"] == pytest.approx(closed, rel=1e-5)
