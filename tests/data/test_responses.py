"""The mask beside the tokens: rows whose prompts are not learnt."""

import json

import numpy as np
import pytest

from rmoe_megablocks.data import DataError, DatasetMetadata, prepare, read_tokens
from rmoe_megablocks.data.prepared.indexed import read_index
from rmoe_megablocks.data.prepared.responses import Masks
from rmoe_megablocks.data.tokenizers import SentencePieceTokenizer

LINE = "### Response:"
PROMPTS = ("ask\n\n", "", "  once more é\n", "last\n")
ANSWERS = ("YES\n\n日本", "NO", "", "#### Response:")


def source(path, *texts) -> object:
    texts = texts or [f"{prompt}{LINE}\n{answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    path.write_text(json.dumps([{"text": text} for text in texts]))
    return path


def made(tmp_path, *texts, **options):
    values = dict(split="50%,50%,0", json_key="text", loss_after=LINE, append_eod=True) | options
    return prepare([source(tmp_path / "rows.json", *texts)], tmp_path / "out", **values)


def documents(prefix):
    """(ids, mask) of each document."""
    ids, masks, start = read_tokens(prefix), Masks(prefix), 0
    for number, length in enumerate(read_index(prefix).lengths):
        yield ids[start : start + length], masks.get(number)
        start += length


def test_bytes(tmp_path):
    metadata = made(tmp_path)
    assert metadata.loss_after == LINE and metadata == DatasetMetadata.load(tmp_path / "out")
    found = [pair for split in ("train", "valid") for pair in documents(tmp_path / "out" / split)]
    for (ids, mask), prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        whole, said = f"{prompt}{LINE}\n{answer}".encode(), answer.encode()
        assert ids.tolist() == [*whole, 256]
        assert mask.tolist() == [0] * (len(whole) - len(said)) + [1] * (len(said) + 1)
    masks = Masks(tmp_path / "out" / "train")
    assert masks.get(0, 3, 5).tolist() == masks.get(0).tolist()[3:8]


@pytest.mark.parametrize("name", ["exact", "breaks", "fallback"])
def test_sentencepiece(tmp_path, models, name):
    made(tmp_path, split="100%,0,0", tokenizer="sentencepiece", tokenizer_model=models[name])
    tokenizer = SentencePieceTokenizer(models[name], eod=True)
    for (ids, mask), prompt, answer in zip(documents(tmp_path / "out" / "train"), PROMPTS, ANSWERS, strict=True):
        alone = tokenizer.encode_pieces([f"{prompt}{LINE}\n"], at_start=True)  # as a prompt at generation
        assert (np.flatnonzero(mask) == np.arange(len(alone), len(ids))).all() and ids[-1] == tokenizer.eod_id
        assert (ids[: len(alone)] == alone).all()
        if name == "exact":
            assert tokenizer.decode(ids[:-1]).decode() == f"{prompt}{LINE}\n{answer}"


@pytest.mark.parametrize(
    "texts, options, expected",
    [
        (["a\n### Response:\nb", "c"], {}, "row 2, which begins 'c', has the line '### Response:' nowhere"),
        ([f"{LINE}\n{LINE}\n"], {}, "has the line '### Response:' 2 times"),
        ([f"{LINE}\na\n{LINE}\nb"], {}, "has the line '### Response:' 2 times"),
        ([f"a {LINE}\nb"], {}, "nowhere, expected once"),
        ([], {"loss_after": "a\nb"}, "--loss-after 'a\\nb': expected one line"),
        ([], {"loss_after": ""}, "expected one line"),
        ([], {"json_key": None, "input_format": "text"}, "expected one line, and --json-key"),
    ],
    ids=range(7),
)
def test_bad_input(tmp_path, texts, options, expected):
    with pytest.raises(DataError) as raised:
        made(tmp_path, *texts, **options)
    assert expected in str(raised.value) and not (tmp_path / "out").exists()


def test_a_mask_that_is_not_whole(tmp_path):
    made(tmp_path)
    path = tmp_path / "out" / "train.mask"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="train.mask"):
        Masks(tmp_path / "out" / "train")
    with pytest.raises(DataError, match="train.mask"):
        DatasetMetadata.load(tmp_path / "out")
    made(tmp_path, overwrite=True)
    path.unlink()
    with pytest.raises(DataError, match="train.mask"):
        DatasetMetadata.load(tmp_path / "out")
