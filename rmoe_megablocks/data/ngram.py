"""A baseline that any language model has to beat: the bigram model, in bits per byte of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared.indexed import read_tokens
from rmoe_megablocks.data.prepared.metadata import DatasetMetadata, dataset_dir

_CHUNK_TOKENS = 1 << 22
# pairs of so few kinds are counted in a table of all of them, which is much faster than sorting
_MAX_TABLE = 1 << 22


def bigram_bits_per_byte(train_tokens: np.ndarray, test_tokens: np.ndarray, test_bytes: int, vocab_size: int) -> float:
    """Bits per byte of ``test_tokens`` under a bigram model counted on ``train_tokens``.

    Witten-Bell smoothing interpolates the bigram with the unigram and that with the uniform distribution::

        P(w | v) = (c(v, w) + T(v) P(w)) / (c(v) + T(v))        P(w) = (c(w) + T / V) / (N + T)

    c(v, w) is how often w follows v in training, c(v) the sum of that over w, T(v) the number of different tokens
    seen after v; N is the number of training tokens, T the number of different ones, V the vocabulary's size. After
    a v that training never continues, P(w | v) = P(w), which is also the probability of the first test token. The
    result is -log2 of the product of all test tokens' probabilities, over ``test_bytes``.

    Memory is some 40 bytes for each different pair in the training tokens, plus chunks of a few million tokens.

    Args:
        train_tokens, test_tokens: 1-D, integers in [0, vocab_size); may be memory-mapped.
        test_bytes: bytes of the text that ``test_tokens`` encode.
        vocab_size: V, at most 2**31.

    Raises:
        DataError: there are no tokens, no bytes, or ids out of range.
    """
    if len(train_tokens) == 0 or len(test_tokens) == 0 or test_bytes <= 0:
        raise DataError("a bigram baseline needs training tokens, test tokens and a positive number of test bytes")
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    for chunk in _chunks(train_tokens, "train", vocab_size):
        unigrams += np.bincount(chunk, minlength=vocab_size)
    types = np.count_nonzero(unigrams)
    unigram_p = (unigrams + types / vocab_size) / (len(train_tokens) + types)

    pairs, counts = _count_pairs(train_tokens, "train", vocab_size)
    histories = pairs // vocab_size
    continuations = np.bincount(histories, minlength=vocab_size)  # T(v)
    history_counts = unigrams
    history_counts[train_tokens[-1]] -= 1  # c(v): the last token has nothing after it

    test_pairs, test_counts = _count_pairs(test_tokens, "test", vocab_size)
    v, w = test_pairs // vocab_size, test_pairs % vocab_size
    at = np.searchsorted(pairs, test_pairs)
    seen = np.zeros(len(test_pairs), dtype=np.int64)
    inside = at < len(pairs)
    hits = np.flatnonzero(inside)[pairs[at[inside]] == test_pairs[inside]]
    seen[hits] = counts[at[hits]]
    weight = np.maximum(history_counts[v] + continuations[v], 1)
    p = np.where(continuations[v] > 0, (seen + continuations[v] * unigram_p[w]) / weight, unigram_p[w])
    bits = -np.dot(test_counts, np.log2(p)) - np.log2(unigram_p[test_tokens[0]])
    return float(bits / test_bytes)


def dataset_bigram_bits_per_byte(dataset: str | Path, split: str = "test") -> float:
    """:func:`bigram_bits_per_byte` of a prepared dataset's ``split``, counted on its train split."""
    metadata = DatasetMetadata.load(dataset)
    directory = dataset_dir(dataset)
    if split not in metadata.splits or metadata.splits[split].tokens == 0:
        raise DataError(f"{directory}: has no split {split!r}")
    train, test = read_tokens(directory / "train"), read_tokens(directory / split)
    return bigram_bits_per_byte(train, test, metadata.splits[split].bytes, metadata.vocab_size)


def _chunks(tokens: np.ndarray, name: str, vocab_size: int, overlap: int = 0) -> Iterator[np.ndarray]:
    """``tokens`` as int64 in chunks, of which each repeats the last ``overlap`` tokens of the one before."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS + overlap], dtype=np.int64)
        if chunk.min() < 0 or chunk.max() >= vocab_size:
            raise DataError(f"{name} tokens go from {chunk.min()} to {chunk.max()}, the vocabulary has {vocab_size}")
        yield chunk


def _count_pairs(tokens: np.ndarray, name: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs of neighbours as codes v * vocab_size + w, ascending, and their counts; both int64."""
    codes = (c[:-1] * vocab_size + c[1:] for c in _chunks(tokens, name, vocab_size, overlap=1))
    if vocab_size**2 <= _MAX_TABLE:
        table = np.zeros(vocab_size**2, dtype=np.int64)
        for chunk in codes:
            table += np.bincount(chunk, minlength=len(table))
        pairs = np.flatnonzero(table)
        return pairs, table[pairs]
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for chunk in codes:
        new_pairs, new_counts = np.unique(chunk, return_counts=True)
        pairs, inverse = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        merged = np.zeros(len(pairs), dtype=np.int64)
        np.add.at(merged, inverse, np.concatenate([counts, new_counts]))
        counts = merged
    return pairs, counts
