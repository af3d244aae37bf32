"""The corpus that comes with the package, so that a first run needs no download: the first megabyte of enwik8.

corpus/enwik8_1mb.xz is ``head -c 1000000 enwik8 | xz -9e`` in Python's lzma; NOTICE says where it comes from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from rmoe_megablocks.data.build import OutputExists, prepare
from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared.metadata import DatasetMetadata
from rmoe_megablocks.data.reading.compression import open_text

CORPUS_PATH = Path(__file__).parent / "corpus" / "enwik8_1mb.xz"
CORPUS_SHA256 = "369b688978f649681136198fb96db14c1616756260c55fb4b65e9bc049552cad"
DEFAULT_SPLIT = "90%,5%,5%"


def embedded_corpus() -> bytes:
    """The corpus: 1,000,000 bytes of Wikipedia's XML, valid UTF-8.

    Raises:
        DataError: the file is missing from the installation or damaged.
    """
    with open_text(CORPUS_PATH) as stream:
        text = stream.read()
    if hashlib.sha256(text).hexdigest() != CORPUS_SHA256:
        raise DataError(f"{CORPUS_PATH}: damaged: install the package again")
    return text


def prepare_embedded(output_dir: str | Path) -> DatasetMetadata:
    """Make sure that ``output_dir`` is the byte-level dataset of the embedded corpus, split 90 %, 5 %, 5 %.

    What is there already is checked and used. Any number of processes may do this at once: one of them wins, and all
    return when the dataset is complete.

    Raises:
        DataError: the folder holds something else, or a damaged dataset.
    """
    if Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        return _existing(output_dir)
    embedded_corpus()  # checks it
    try:
        return prepare([CORPUS_PATH], output_dir, split=DEFAULT_SPLIT)
    except OutputExists:
        return _existing(output_dir)


def _existing(output_dir: str | Path) -> DatasetMetadata:
    metadata = DatasetMetadata.load(output_dir)
    with open(CORPUS_PATH, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    found = (metadata.tokenizer, metadata.vocab_size, metadata.split, [source.sha256 for source in metadata.sources])
    if found != ("bytes", 256, DEFAULT_SPLIT, [sha256]):
        raise DataError(f"{output_dir}: is another dataset than the embedded corpus: choose another folder")
    return metadata
