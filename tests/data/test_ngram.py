"""The bigram baseline against a slow reference that shares nothing with it."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from rmoe_megablocks.data import DataError, bigram_bits_per_byte, dataset_bigram_bits_per_byte, ngram, prepare


def slow_bits(train: list[int], test: list[int], vocab_size: int) -> float:
    after = defaultdict(Counter)
    for left, right in zip(train, train[1:], strict=False):
        after[left][right] += 1
    words = Counter(train)

    def unigram(word: int) -> float:
        return (words[word] + len(words) * (1 / vocab_size)) / (len(train) + len(words))

    def bigram(left: int, word: int) -> float:
        seen = after.get(left)
        if not seen:
            return unigram(word)
        total, kinds = sum(seen.values()), len(seen)
        return total / (total + kinds) * (seen[word] / total) + kinds / (total + kinds) * unigram(word)

    for left in {*test[:20], 0} if vocab_size < 1000 else ():
        assert math.isclose(sum(bigram(left, word) for word in range(vocab_size)), 1)
    bits = -math.log2(unigram(test[0]))
    return bits - sum(math.log2(bigram(left, word)) for left, word in zip(test, test[1:], strict=False))


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_reference(monkeypatch, table, chunk):
    monkeypatch.setattr(ngram, "_MAX_TABLE", 1 << 22 if table else 0)
    monkeypatch.setattr(ngram, "_CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(0)
    for vocab_size, seen, dtype in ((2, 2, np.uint8), (40, 23, np.uint16), (256, 256, np.int32)):
        train = (rng.zipf(1.3, 900) % seen).astype(dtype)
        test = (rng.zipf(1.1, 300) % vocab_size).astype(dtype)
        found = bigram_bits_per_byte(train, test, 777, vocab_size)
        assert found == pytest.approx(slow_bits(train.tolist(), test.tolist(), vocab_size) / 777, rel=1e-12)


def test_the_last_training_token_has_no_continuation():
    train, test = np.array([0, 1, 2]), np.array([2, 0, 2, 3])
    assert bigram_bits_per_byte(train, test, 1, 4) == pytest.approx(slow_bits([0, 1, 2], [2, 0, 2, 3], 4))
    assert np.isfinite(bigram_bits_per_byte(np.array([0]), np.array([1]), 1, 2))


def test_large_vocabulary():
    rng = np.random.default_rng(1)
    train, test = rng.integers(0, 100_000, 20_000), rng.integers(0, 100_000, 100)
    train[-50:] = test[:50]
    reference = slow_bits(train.tolist(), test[:21].tolist(), 100_000)
    assert bigram_bits_per_byte(train, test[:21], 1, 100_000) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("train", "test", "size", "says"),
    [
        ([], [1], 1, "needs training tokens"),
        ([1], [], 1, "needs training tokens"),
        ([1], [1], 0, "number of test bytes"),
        ([1, 4], [1], 1, "train tokens go from 1 to 4, the vocabulary has 4"),
        ([1, 2], [1, -1], 1, "test tokens go from -1 to 1"),
    ],
)
def test_errors(train, test, size, says):
    with pytest.raises(DataError, match=says):
        bigram_bits_per_byte(np.array(train, dtype=np.int64), np.array(test, dtype=np.int64), size, 4)


def test_dataset(tmp_path):
    text = b"abracadabra" * 50
    (tmp_path / "text").write_bytes(text)
    prepare([tmp_path / "text"], tmp_path / "out", split="500,50,0")
    found = dataset_bigram_bits_per_byte(tmp_path / "out", "valid")
    assert found == pytest.approx(slow_bits(list(text[:500]), list(text[500:550]), 256) / 50)
    with pytest.raises(DataError, match="no split 'test'"):
        dataset_bigram_bits_per_byte(tmp_path / "out")
