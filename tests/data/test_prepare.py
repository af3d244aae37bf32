"""Round trips: what is in the files is what was in the text."""

import gzip
import hashlib
import json
import lzma
from types import SimpleNamespace

import numpy as np
import pytest

from rmoe_megablocks.data import DatasetMetadata, make_tokenizer, prepare, read_tokens
from rmoe_megablocks.data.prepared import indexed
from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.data.tokenizers import ByteTokenizer


def decoded(folder) -> list[bytes]:
    metadata = DatasetMetadata.load(folder)
    tokenizer = ByteTokenizer(metadata.eod_id is not None)
    return [tokenizer.decode(read_tokens(folder / name)) for name in SPLITS]


def documents(prefix) -> list[np.ndarray]:
    dataset = indexed.import_megatron().IndexedDataset(str(prefix))
    assert len(dataset) == len(dataset.document_indices) - 1
    return [dataset[number].copy() for number in range(len(dataset))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_bytes_are_cut_exactly(tmp_path, suffix):
    text = np.random.default_rng(0).bytes(3_000_017)  # more than a chunk, no valid UTF-8
    source = tmp_path / f"corpus{suffix}"
    source.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](text))
    metadata = prepare([source], tmp_path / "out", split="2097153,500k,400000", input_format="bytes")
    assert decoded(tmp_path / "out") == [text[:2097153], text[2097153:2597153], text[2597153:2997153]]
    assert [split.bytes for split in metadata.splits.values()] == [2097153, 500000, 400000]
    assert [split.tokens for split in metadata.splits.values()] == [2097153, 500000, 400000]
    assert [split.documents for split in metadata.splits.values()] == [1, 1, 1]
    assert metadata.unused_bytes == 2864
    assert (metadata.tokenizer, metadata.vocab_size, metadata.eod_id) == ("bytes", 256, None)
    assert metadata == DatasetMetadata.load(tmp_path / "out")
    (file,) = metadata.sources
    compressed = source.read_bytes()
    assert (file.name, file.size, file.text_bytes) == (source.name, len(compressed), len(text))
    assert file.sha256 == hashlib.sha256(compressed).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["dataset.json", *(f"{name}.{kind}" for name in SPLITS for kind in ("bin", "idx"))]
    )


def test_several_files_are_one_stream(tmp_path):
    parts = [b"abc" * 1000, b"\xff\n" * 10, b"tail"]
    paths = [tmp_path / name for name in ("b.txt", "a.txt.gz", "c")]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(gzip.compress(part) if path.suffix == ".gz" else part)
    metadata = prepare(paths, tmp_path / "deep" / "er", split="90%,5%,5%", input_format="bytes")
    assert b"".join(decoded(tmp_path / "deep" / "er")) == b"".join(parts)
    assert [source.name for source in metadata.sources] == ["b.txt", "a.txt.gz", "c"]
    assert metadata.unused_bytes == 0


def test_a_split_may_be_left_out(tmp_path):
    (tmp_path / "text").write_bytes(b"hello world")
    prepare([tmp_path / "text"], tmp_path / "out", split="100%,0%,0%")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.json", "train.bin", "train.idx"]
    assert DatasetMetadata.load(tmp_path / "out").splits["valid"].tokens == 0


def test_end_of_document(tmp_path):
    text = bytes(range(256)) * 40
    (tmp_path / "text").write_bytes(text)
    metadata = prepare(
        [tmp_path / "text"], tmp_path / "out", split="10k,100,100", append_eod=True, input_format="bytes"
    )
    assert (metadata.vocab_size, metadata.eod_id) == (257, 256)
    for name, size in zip(SPLITS, (10000, 100, 100), strict=True):
        tokens = read_tokens(tmp_path / "out" / name)
        assert len(tokens) == size + 1 == metadata.splits[name].tokens
        assert tokens[-1] == 256 and tokens[:-1].max() < 256
        assert metadata.splits[name].bytes == size
    assert decoded(tmp_path / "out") == [text[:10000], text[10000:10100], text[10100:10200]]


@pytest.mark.parametrize("shares", [(80, 10, 10), (61, 7, 32), (50, 5, 5), (77, 3, 20)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_rows_are_documents(tmp_path, suffix, shares):
    rows = [f"row {number} é" * (number % 7) for number in range(200)]
    lines = "\n".join(json.dumps({"id": 1, "body": row}) for row in rows) + "\n\n"
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(gzip.compress(lines.encode()) if suffix else lines.encode())
    split = ",".join(f"{share}%" for share in shares)
    metadata = prepare([path], tmp_path / "out", split=split, json_key="body", append_eod=True)

    kept = [row.encode() for row in rows if row]
    found = {name: documents(tmp_path / "out" / name) for name in SPLITS}
    assert all(document[-1] == 256 for name in SPLITS for document in found[name])
    texts = [ByteTokenizer(True).decode(document) for name in SPLITS for document in found[name]]
    assert texts == kept[: len(texts)]
    assert sum(map(len, kept[len(texts) :])) == metadata.unused_bytes
    assert [split.documents for split in metadata.splits.values()] == [len(found[name]) for name in SPLITS]
    # no other boundary between rows is nearer to what was asked for
    boundaries = np.cumsum([0, *map(len, kept)])
    for share, end in zip(np.cumsum(shares), np.cumsum([s.bytes for s in metadata.splits.values()]), strict=True):
        distances = np.abs(boundaries - share / 100 * boundaries[-1])
        assert boundaries[distances.argmin()] == end


def test_long_streams_become_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "MAX_DOCUMENT_TOKENS", 1000)
    text = bytes(range(200)) * 21
    (tmp_path / "text").write_bytes(text)
    metadata = prepare(
        [tmp_path / "text"], tmp_path / "out", split="3000,1001,199", append_eod=True, input_format="bytes"
    )
    assert [len(document) for document in documents(tmp_path / "out" / "train")] == [1000, 1000, 1000, 1]
    assert [len(document) for document in documents(tmp_path / "out" / "valid")] == [1000, 2]
    assert metadata.splits["train"].documents == 4
    assert b"".join(decoded(tmp_path / "out")) == text


def test_dtypes_are_those_of_megatron():
    megatron = indexed.import_megatron()
    assert {code.value: code.name for code in megatron.DType} == indexed._DTYPES


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_megatron_reads_it(tmp_path, models, text, tokenizer):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    (tmp_path / "text").write_text(text)
    model = models["exact"] if tokenizer == "sentencepiece" else None
    out = tmp_path / "out"
    metadata = prepare([tmp_path / "text"], out, split="90%,5%,5%", tokenizer=tokenizer, tokenizer_model=model)
    for name, kind in zip(SPLITS, (Split.train, Split.valid, Split.test), strict=True):
        prefix = str(out / name)
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=64,
            blend_per_split=[([prefix], None)] * 3,
            tokenizer=SimpleNamespace(vocab_size=metadata.vocab_size, eod=-1, pad=-2, unique_identifiers={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        low = GPTDataset.build_low_level_dataset(prefix, config)
        elements = np.arange(GPTDataset.numel_low_level_dataset(low), dtype=np.int32)
        dataset = GPTDataset(low, prefix, elements, None, kind, config)
        tokens = read_tokens(prefix)
        assert len(dataset) == (len(tokens) - 1) // 64
        for number, place in enumerate(dataset.shuffle_index):
            window = tokens[64 * place : 64 * place + 65].astype(np.int64)
            assert np.array_equal(dataset[number]["tokens"].numpy(), window[:-1])
            assert np.array_equal(dataset[number]["labels"].numpy(), window[1:])
    # Megatron has put its sample indices into folders named as the prefixes: still a dataset, and replaceable
    assert (out / "train").is_dir()
    assert DatasetMetadata.load(out / "train") == metadata
    prepare([tmp_path / "text"], out, split="80%,10%,10%", overwrite=True)
    assert not (out / "train").exists()


def test_memory_does_not_grow_with_the_text(tmp_path):
    import tracemalloc

    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"0123456789abcdef" * (1 << 21), compresslevel=1))  # 32 MiB
    indexed.import_megatron()
    tracemalloc.start()
    try:
        prepare([path], tmp_path / "out", split="90%,5%,5%")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_tokenizers_decode_what_they_encode(models):
    tokenizer = make_tokenizer("sentencepiece", models["exact"])
    encoder = tokenizer.encoder()
    ids = np.concatenate([encoder.feed("né".encode()[:2]), encoder.feed("né".encode()[2:]), encoder.finish()])
    assert tokenizer.decode(ids) == "né".encode()
