"""Megatron's indexed dataset: a split is PREFIX.bin, the tokens, and PREFIX.idx, where its documents begin.

Writing goes through Megatron's own builder. Reading needs neither Megatron (seconds to import) nor torch.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from rmoe_megablocks.data.errors import DataError

# Megatron indexes tokens within a document with int32; a longer stream is cut into documents of this size
MAX_DOCUMENT_TOKENS = 1 << 30

_CHUNK_TOKENS = 1 << 24

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_MAGIC = b"MMIDIDX\x00\x00"
# megatron.core.datasets.indexed_dataset.DType
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


def import_megatron() -> ModuleType:
    """Megatron's module of the format, imported without its warnings, which are about training on a GPU."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        log.setLevel(level)
    return indexed_dataset


class SplitWriter:
    """Writes one split as a stream of tokens, of any number of documents.

    The dtype is Megatron's choice for the vocabulary: uint16, or int32 from 65,500 ids on. Not uint8 for bytes:
    Megatron could read that from the index, but its fast path (--per-dataset-sequences-path) skips the index and
    takes every small vocabulary for uint16.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        megatron = import_megatron()
        self.dtype = np.dtype(megatron.DType.optimal_dtype(vocab_size))
        self._prefix = prefix
        self._builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype.type)
        self._length = 0
        self.tokens = 0
        self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        """Append ids (1-D, integers below the vocabulary's size) to the current document."""
        while len(ids):
            part, ids = np.split(ids, [MAX_DOCUMENT_TOKENS - self._length])
            # the builder's add_item takes whole documents only, which would have to fit into memory
            self._builder.data_file.write(part.astype(self.dtype).tobytes())
            self._length += len(part)
            if self._length == MAX_DOCUMENT_TOKENS:
                self.end_document()

    def end_document(self) -> None:
        """End the current document; an empty one leaves no trace."""
        if self._length:
            self._builder.sequence_lengths.append(self._length)
            self._builder.end_document()
            self.tokens += self._length
            self.documents += 1
            self._length = 0

    def close(self) -> None:
        """Write the index, unless there is nothing: Megatron cannot map an empty file, so then there is none."""
        self.end_document()
        if self.tokens:
            self._builder.finalize(f"{self._prefix}.idx")
        else:
            self.abandon()
            os.unlink(f"{self._prefix}.bin")

    def abandon(self) -> None:
        """Close the file without an index."""
        self._builder.data_file.close()


def expected_sizes(prefix: Path, dtype: str, tokens: int, documents: int) -> list[tuple[Path, int]]:
    """(path, bytes) of the two files of a split."""
    index = _HEADER.size + documents * (4 + 8) + (documents + 1) * 8
    return [(Path(f"{prefix}.bin"), tokens * np.dtype(dtype).itemsize), (Path(f"{prefix}.idx"), index)]


def check_dtype(dtype: str) -> None:
    """ValueError unless ``dtype`` names a type of tokens that an index can have."""
    if dtype not in _DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}")


@dataclass(frozen=True)
class Index:
    """What an index says: the type of the tokens, and how many each document (a sequence of Megatron's) has, int32."""

    dtype: np.dtype
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def read_index(prefix: str | Path) -> Index:
    """The index of the split PREFIX, once it is known to fit to the tokens beside it.

    Raises:
        DataError: a file is missing, the index is none, or the two do not fit together.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    try:
        with open(idx_path, "rb") as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise DataError(f"{idx_path}: truncated index")
            magic, version, code, sequences, _ = _HEADER.unpack(header)
            if magic != _MAGIC or version != 1 or code not in _DTYPES:
                raise DataError(f"{idx_path}: not an index of Megatron's indexed dataset")
        if idx_path.stat().st_size < _HEADER.size + 4 * sequences:
            raise DataError(f"{idx_path}: truncated index")
        lengths = np.empty(0, np.int32)
        if sequences:  # mapped: all ranks of a machine read it
            lengths = np.memmap(idx_path, np.int32, mode="r", offset=_HEADER.size, shape=(sequences,))
        index = Index(np.dtype(_DTYPES[code]), lengths)
        size, expected = bin_path.stat().st_size, index.tokens * index.dtype.itemsize
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file") from None
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: cannot be read ({error.strerror})") from None
    if size != expected:
        raise DataError(f"{bin_path}: {size:,} bytes, but its index says {expected:,}")
    return index


def read_tokens(prefix: str | Path) -> np.ndarray:
    """All tokens of the split PREFIX, 1-D, documents joined, read-only and memory-mapped, in the dtype on disk.

    Raises:
        DataError: as :func:`read_index`.
    """
    index = read_index(prefix)
    if index.tokens == 0:
        return np.empty(0, index.dtype)
    try:
        return np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    except OSError as error:
        raise DataError(f"{prefix}.bin: cannot be read ({error.strerror})") from None


def id_range(prefix: str | Path, advance: Callable[[int], object] = lambda size: None) -> tuple[int, int]:
    """(smallest, largest) token id of the split PREFIX, which has tokens. ``advance`` is told of the bytes read."""
    tokens = read_tokens(prefix)
    smallest = largest = int(tokens[0])
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
        advance(chunk.nbytes)
    return smallest, largest
