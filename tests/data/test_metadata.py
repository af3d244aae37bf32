import json

import numpy as np
import pytest

from rmoe_megablocks.data import DataError, DatasetMetadata, check_tokenizer, prepare, read_tokens


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "text").write_bytes(b"some text " * 100)
    prepare([tmp_path / "text"], tmp_path / "out", split="800,100,100B")
    return tmp_path / "out"


def test_from_the_folder_or_a_prefix(dataset):
    metadata = DatasetMetadata.load(dataset)
    assert metadata == DatasetMetadata.load(str(dataset / "train")) == DatasetMetadata.load(dataset / "test")
    assert metadata.split == "800,100,100B"


def change(dataset, **fields):
    path = dataset / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "dataset.json").unlink(), "dataset.json: no such file"),
        (lambda d: (d / "dataset.json").write_bytes(b'{"format_ver'), "dataset.json: not JSON"),
        (lambda d: (d / "dataset.json").write_bytes(b"\xff\xfe\x00"), "dataset.json: not JSON"),
        (lambda d: (d / "dataset.json").write_bytes(b"[]"), "not the metadata of a dataset"),
        (lambda d: change(d, format_version=2), "format version 2, expected 1"),
        (lambda d: change(d, splits={}), "corrupt metadata .KeyError: 'train'"),
        (lambda d: change(d, splits=[]), "corrupt metadata"),
        (lambda d: change(d, sources=None), "corrupt metadata"),
        (lambda d: change(d, vocab_size="256"), "corrupt metadata"),
        (lambda d: change(d, dtype="uint99"), "corrupt metadata .*uint99"),
        (lambda d: change(d, surprise=1), "corrupt metadata .*surprise"),
        (lambda d: (d / "valid.bin").unlink(), "valid.bin: no such file"),
        (lambda d: (d / "test.idx").unlink(), "test.idx: no such file"),
        (lambda d: (d / "train.bin").write_bytes(b"\0" * 1599), "train.bin: truncated: 1,599 bytes, .* says 1,600"),
        (lambda d: (d / "train.bin").write_bytes(b"\0" * 1601), "train.bin: too long"),
        (lambda d: (d / "train.idx").write_bytes((d / "train.idx").read_bytes()[:-1]), "train.idx: truncated"),
        (lambda d: (d / "train.idx").write_bytes(b"x" * 62), "train.idx: not an index"),
        (
            lambda d: (d / "valid.idx").write_bytes((d / "train.idx").read_bytes()),
            "valid.bin: 200 bytes, but",
        ),
        (lambda d: change(d, vocab_size=-1), "corrupt metadata"),
        (lambda d: change(d, dtype="int16"), "train.idx: is of another dataset than dataset.json"),
    ],
)
def test_damage_is_named(dataset, damage, says):
    damage(dataset)
    with pytest.raises(DataError, match=says) as error:
        DatasetMetadata.load(dataset)
    assert "\n" not in str(error.value)


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match="nothing.dataset.json: no such file"):
        DatasetMetadata.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "train.bin").unlink(), "train.bin: no such file"),
        (lambda d: (d / "train.idx").unlink(), "train.idx: no such file"),
        (lambda d: (d / "train.bin").write_bytes(b""), "train.bin: 0 bytes, but its index says 1,600"),
        (lambda d: (d / "train.idx").write_bytes(b"MMIDIDX"), "train.idx: truncated index"),
        (lambda d: (d / "train.idx").write_bytes((d / "train.idx").read_bytes()[:35]), "train.idx: truncated index"),
        (lambda d: (d / "train.idx").write_bytes(b"x" * 62), "train.idx: not an index"),
    ],
)
def test_read_tokens_names_damage(dataset, damage, says):
    damage(dataset)
    with pytest.raises(DataError, match=says):
        read_tokens(dataset / "train")


def test_read_tokens_maps(dataset):
    tokens = read_tokens(dataset / "train")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable


def test_check_tokenizer(tmp_path, models, dataset):
    byte_level = DatasetMetadata.load(dataset)
    check_tokenizer(byte_level, "bytes", None, 256)
    check_tokenizer(byte_level, "bytes", None, 384)
    check_tokenizer(byte_level, "bytes")
    with pytest.raises(DataError, match="prepared with the tokenizer bytes, but training uses sentencepiece"):
        check_tokenizer(byte_level, "sentencepiece", models["exact"], 256)
    with pytest.raises(DataError, match="ids below 256, but training's vocabulary has only 255"):
        check_tokenizer(byte_level, "bytes", None, 255)

    pieces = prepare(
        [tmp_path / "text"], tmp_path / "sp", split="1,0,0", tokenizer="sentencepiece", tokenizer_model=models["exact"]
    )
    renamed = tmp_path / "renamed.model"
    renamed.write_bytes(models["exact"].read_bytes())
    check_tokenizer(pieces, "sentencepiece", renamed, pieces.vocab_size)
    with pytest.raises(DataError, match="model exact.model .*, but training uses .*default.model"):
        check_tokenizer(pieces, "sentencepiece", models["default"], pieces.vocab_size)
    with pytest.raises(DataError, match="exact.model, training names none"):
        check_tokenizer(pieces, "sentencepiece", None, pieces.vocab_size)
    with pytest.raises(DataError, match="gone.model: cannot be read"):
        check_tokenizer(pieces, "sentencepiece", tmp_path / "gone.model", pieces.vocab_size)
    with pytest.raises(DataError, match="tokenizer sentencepiece, but training uses bytes"):
        check_tokenizer(pieces, "bytes", None, 256)
