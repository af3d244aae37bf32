import hashlib
import lzma
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from rmoe_megablocks.data import (
    DataError,
    DatasetMetadata,
    embedded,
    embedded_corpus,
    prepare,
    prepare_embedded,
    read_tokens,
)
from rmoe_megablocks.data.prepared import indexed
from rmoe_megablocks.data.split import SPLITS


def test_corpus():
    corpus = embedded_corpus()
    assert len(corpus) == 1_000_000
    assert corpus.decode().startswith('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.3/"')
    # md5 of the first 1,000,000 bytes of enwik8, taken with head and md5sum
    assert hashlib.md5(corpus).hexdigest() == "83a2cefd8ca00049e0445542dabd25a0"
    assert embedded.CORPUS_PATH.stat().st_size < 300_000


def test_damaged_corpus(tmp_path, monkeypatch):
    path = tmp_path / "corpus.xz"
    path.write_bytes(lzma.compress(b"something else"))
    monkeypatch.setattr(embedded, "CORPUS_PATH", path)
    with pytest.raises(DataError, match="corpus.xz: damaged"):
        embedded_corpus()
    with pytest.raises(DataError, match="corpus.xz: damaged"):
        prepare_embedded(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="corpus.xz: no such file"):
        embedded_corpus()


def test_prepare(tmp_path, monkeypatch):
    indexed.import_megatron()
    start = time.process_time()
    metadata = prepare_embedded(tmp_path / "out")
    assert time.process_time() - start < 5
    assert [split.tokens for split in metadata.splits.values()] == [900_000, 50_000, 50_000]
    tokens = np.concatenate([read_tokens(tmp_path / "out" / name) for name in SPLITS])
    assert tokens.astype(np.uint8).tobytes() == embedded_corpus()
    # again: nothing is written, nor prepared in vain
    monkeypatch.setattr(embedded, "prepare", None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare_embedded(tmp_path / "out") == metadata
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_another_or_a_damaged_dataset_is_not_taken_for_it(tmp_path):
    (tmp_path / "text").write_bytes(b"text" * 100)
    prepare([tmp_path / "text"], tmp_path / "other", split="90%,5%,5%")
    with pytest.raises(DataError, match="another dataset than the embedded corpus"):
        prepare_embedded(tmp_path / "other")
    prepare([embedded.CORPUS_PATH], tmp_path / "eod", split="90%,5%,5%", append_eod=True)
    with pytest.raises(DataError, match="another dataset than the embedded corpus"):
        prepare_embedded(tmp_path / "eod")
    prepare_embedded(tmp_path / "damaged")
    (tmp_path / "damaged" / "test.bin").write_bytes(b"")
    with pytest.raises(DataError, match="test.bin: truncated"):
        prepare_embedded(tmp_path / "damaged")


def test_another_process_is_faster(tmp_path, monkeypatch):
    """The folder comes into being between the first look and the last rename."""
    prepare_embedded(tmp_path / "theirs")
    original = embedded.prepare
    # the latest moment: the check before the rename has seen no folder yet
    monkeypatch.setattr("rmoe_megablocks.data.build._check_target", lambda *args: None)
    staged = indexed.SplitWriter.close

    def close(self):
        if not (tmp_path / "out").exists():
            shutil.copytree(tmp_path / "theirs", tmp_path / "out")
        staged(self)

    monkeypatch.setattr(indexed.SplitWriter, "close", close)
    metadata = prepare_embedded(tmp_path / "out")
    assert metadata == DatasetMetadata.load(tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "file").touch()
    with pytest.raises(DataError, match="came into being"):
        original([embedded.CORPUS_PATH], tmp_path / "out2", split="90%,5%,5%")


def _race(folder: Path, barrier, results) -> None:
    indexed.import_megatron()
    barrier.wait()
    try:
        results.put(prepare_embedded(folder).splits["train"].tokens)
    except BaseException as error:
        results.put(repr(error))


def test_several_processes_at_once(tmp_path, processes):
    barrier, results = processes.Barrier(4), processes.Queue()
    children = [processes.Process(target=_race, args=(tmp_path / "out", barrier, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [900_000] * 4
    for child in children:
        child.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
