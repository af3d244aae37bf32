"""SentencePiece: long texts are encoded in pieces, and that must not show."""

import numpy as np
import pytest
import sentencepiece

from rmoe_megablocks.data import make_tokenizer, prepare, read_tokens, tokenizers
from rmoe_megablocks.data.split import SPLITS


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokenizers, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", 100)


def encode(tokenizer, data: bytes, step: int) -> np.ndarray:
    encoder = tokenizer.encoder()
    parts = [encoder.feed(data[start : start + step]) for start in range(0, len(data), step)]
    return np.concatenate([*parts, encoder.finish()])


@pytest.mark.parametrize("line_break", ["\n", "\n\n\n"])
@pytest.mark.parametrize("model", ["exact", "breaks"])
def test_pieces_give_the_ids_of_the_whole(models, text, small_pieces, model, line_break):
    tokenizer = make_tokenizer("sentencepiece", models[model])
    assert tokenizer.exact and tokenizer.newlines == "kept"
    # without the one word that is longer than a piece
    text = text.replace("z" * 700, "").replace("\n", line_break)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(models[model])).encode(text)
    for step in (7, 1000, len(text.encode())):
        assert encode(tokenizer, text.encode(), step).tolist() == whole
        assert tokenizer.decode(encode(tokenizer, text.encode(), step)) == text.encode()


@pytest.mark.parametrize("model", ["exact", "breaks"])
@pytest.mark.parametrize("hard", ["\n" * 950, " " * 950, "é" * 950, "a" * 99 + "\n\nb" * 300, "  x" * 400, "\n", " "])
def test_exact_models_lose_nothing(models, small_pieces, model, hard):
    tokenizer = make_tokenizer("sentencepiece", models[model])
    for text in (hard, "start\n" + hard + "end"):
        assert tokenizer.decode(encode(tokenizer, text.encode(), 64)) == text.encode()


@pytest.mark.parametrize("model", ["fallback", "default"])
def test_folding_models_encode_lines(models, text, small_pieces, model):
    tokenizer = make_tokenizer("sentencepiece", models[model])
    assert not tokenizer.exact
    # long runs of one letter have several best segmentations
    text = text.replace("z" * 700, "").replace("x" * 40, "xyz")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(models[model]))
    lines = [reference.encode(line) for line in text.split("\n")]
    ids = encode(tokenizer, text.encode(), 333)
    if model == "fallback":
        assert tokenizer.newlines == "kept"
        newline = reference.piece_to_id("<0x0A>")
        assert ids.tolist() == [i for line in lines for i in [*line, newline]][:-1]
        folded = "\n".join(" ".join(line.split()) for line in text.split("\n"))
        assert tokenizer.decode(ids).decode() == folded
    else:
        assert tokenizer.newlines == "lost"
        assert ids.tolist() == [i for line in lines for i in line]
        # a line break became a space, not nothing
        assert tokenizer.decode(ids).decode().split() == reference.decode(reference.encode(text)).split()


def test_cuts_move_to_the_end_of_a_character(tmp_path, models, monkeypatch):
    text = "ab🙂cd🙃" * 50
    data = text.encode()
    (tmp_path / "text").write_bytes(data)
    for chunk in (1, 3, 1 << 20):
        monkeypatch.setattr("rmoe_megablocks.data.reading.sources.CHUNK_BYTES", chunk)
        for first in range(1, 13):
            out = tmp_path / f"{chunk}-{first}"
            metadata = prepare(
                [tmp_path / "text"],
                out,
                split=f"{first},8,{len(data) - first - 8}",
                tokenizer="sentencepiece",
                tokenizer_model=models["exact"],
            )
            tokenizer = make_tokenizer("sentencepiece", models["exact"])
            parts = [tokenizer.decode(read_tokens(out / name)) for name in SPLITS]
            assert b"".join(parts) == data
            assert "\ufffd" not in "".join(part.decode() for part in parts)
            ends = np.cumsum([split.bytes for split in metadata.splits.values()])
            assert [len(part) for part in parts] == [split.bytes for split in metadata.splits.values()]
            assert all(0 <= end - wanted <= 3 for end, wanted in zip(ends, (first, first + 8, len(data)), strict=True))


def test_invalid_utf8_is_replaced(models):
    tokenizer = make_tokenizer("sentencepiece", models["exact"])
    ids = encode(tokenizer, b"a\xffb\xf0\x9f", 1)
    assert tokenizer.decode(ids).decode() == "a\ufffdb\ufffd"


def test_rows_and_end_of_document(tmp_path, models):
    (tmp_path / "rows.jsonl").write_text('{"text": "one two"}\n{"text": "one two"}\n{"text": "one two"}\n')
    metadata = prepare(
        [tmp_path / "rows.jsonl"],
        tmp_path / "out",
        split="1/1/1".replace("1", "7B"),
        tokenizer="sentencepiece",
        tokenizer_model=models["default"],
        json_key="text",
        append_eod=True,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models["default"]))
    expected = [*processor.encode("one two"), processor.eos_id()]
    assert [read_tokens(tmp_path / "out" / name).tolist() for name in SPLITS] == [expected] * 3
    assert (metadata.tokenizer_model, metadata.eod_id) == ("default.model", processor.eos_id())
    assert metadata.vocab_size == processor.vocab_size()


class CountingText(str):
    """Counts the characters that slicing and splitting copy."""

    copied = 0

    def __getitem__(self, place):
        part = str.__getitem__(self, place)
        CountingText.copied += len(part)
        return CountingText(part)

    def split(self, separator):
        parts = str.split(self, separator)
        CountingText.copied += sum(map(len, parts))
        return [CountingText(part) for part in parts]


@pytest.mark.parametrize("model", ["exact", "default"])
@pytest.mark.parametrize("unit", ["word ", "line\n", "x"])
def test_a_long_text_is_cut_in_linear_time(models, small_pieces, monkeypatch, model, unit):
    tokenizer = make_tokenizer("sentencepiece", models[model])
    text = unit * (100_000 // len(unit))
    monkeypatch.setattr(CountingText, "copied", 0)
    pieces, rest = tokenizer.cut(CountingText(text), final=True)
    assert "".join(pieces) == text and not rest
    assert CountingText.copied <= 3 * len(text)  # by slices of what is left it was 500 times its size


@pytest.mark.parametrize("model", ["exact", "breaks", "fallback", "default"])
@pytest.mark.parametrize("joined", [" ", "\n"])
def test_a_row_of_any_size_is_encoded_in_batches(models, text, monkeypatch, model, joined):
    """The ids do not depend on the batches, and none is larger than it should be."""
    tokenizer = make_tokenizer("sentencepiece", models[model])
    data = joined.join(text.split("\n")).encode()
    monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", 100)
    whole = encode(tokenizer, data, len(data))
    monkeypatch.setattr(tokenizers, "_BATCH_BYTES", 701)
    monkeypatch.setattr(tokenizers, "_BATCH_CHARACTERS", 500)
    sizes = []
    original = tokenizer.encode_pieces
    monkeypatch.setattr(
        tokenizer,
        "encode_pieces",
        lambda pieces, start: (sizes.append(sum(map(len, pieces))), original(pieces, start))[1],
    )
    assert encode(tokenizer, data, len(data)).tolist() == whole.tolist()
    assert len(sizes) > 20 and max(sizes) < 1500


def test_text_that_the_model_does_not_know(tmp_path, models, capsys):
    from tests.data.test_cli import rmoe

    argv = ["data", "prepare", str(tmp_path / "text"), "--output", str(tmp_path / "out"), "--split", "100%,0,0"]
    argv += ["--tokenizer", "sentencepiece", "--tokenizer-model", str(models["default"])]
    (tmp_path / "text").write_text("the of the of the of \u0416\n")
    assert rmoe(*argv) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models["default"]))
    ids = read_tokens(tmp_path / "out" / "train")
    assert (ids == processor.unk_id()).sum() == 1
    assert f"note: 1 tokens ({1 / len(ids):.2%}) stand for characters" in capsys.readouterr().err
    (tmp_path / "text").write_text("\u0416 \u0424 " * 30)
    assert rmoe(*argv, "--overwrite") == 2
    assert "50% of the tokens are its unknown piece" in capsys.readouterr().err
    assert len(read_tokens(tmp_path / "out" / "train")) == len(ids)
