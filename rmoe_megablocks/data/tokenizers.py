"""From bytes of text to token ids, in a stream: one token a byte, or a SentencePiece model.

A tokenizer makes an encoder for each document. The encoder takes the document's bytes in any pieces and gives the
token ids as they become certain, so a document of any size needs a bounded amount of memory.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from rmoe_megablocks.data.errors import DataError

KINDS = ("bytes", "sentencepiece")

# text is given to SentencePiece in batches, cut into pieces that its threads share
_BATCH_CHARACTERS = 1 << 19
_BATCH_BYTES = 1 << 20
_PIECE_CHARACTERS = 1 << 14
# spaces and line breaks in every position that normalisation treats in its own way
_PROBES = ("a\nb", " a\n  b\t\n\nc ", "\n\n\na b", "a  b\n")
_LEADS = ("\n", "a", "0")


class Encoder(Protocol):
    """Encodes one document."""

    def feed(self, data: bytes) -> np.ndarray:
        """The next bytes; returns token ids, 1-D of an integer dtype, possibly empty."""

    def finish(self) -> np.ndarray:
        """The document's end; returns the remaining token ids."""


class Tokenizer(Protocol):
    """What preparing a dataset needs of a tokenizer."""

    kind: str
    vocab_size: int
    eod_id: int | None
    model_path: Path | None
    model_sha256: str | None
    cuts_bytes: bool
    """Whether a split may cut the text between any two bytes; else only between characters."""
    unknown_tokens: int
    """How many of the tokens so far stand for characters that the vocabulary lacks."""
    newlines: str
    """"kept", or "lost" where line breaks become word boundaries."""

    def encoder(self) -> Encoder:
        """An encoder for one document."""

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of ``ids``; ends of documents are left out."""


class ByteTokenizer:
    """Token id = byte value: 256 ids, and 256 itself for the end of a document when ``eod``. Loses nothing."""

    kind = "bytes"
    model_path = None
    model_sha256 = None
    cuts_bytes = True
    newlines = "kept"
    unknown_tokens = 0

    def __init__(self, eod: bool = False) -> None:
        self.eod_id = 256 if eod else None
        self.vocab_size = 257 if eod else 256

    def encoder(self) -> Encoder:
        return self  # it has no state

    def feed(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8)

    def finish(self) -> np.ndarray:
        return np.empty(0, dtype=np.uint8)

    def decode(self, ids: np.ndarray) -> bytes:
        return ids[ids < 256].astype(np.uint8).tobytes()


class SentencePieceTokenizer:
    """A SentencePiece model, used directly through the sentencepiece library.

    What is kept depends on the model. Both ways cut long texts into pieces, preferably at line ends.

    exact
        The model gives back spaces and line breaks as they were (identity normalisation and byte fallback, as
        Llama's). A document is encoded as one text, whatever its size: only its start gets the model's word-boundary
        prefix, and the pieces between are encoded as what they are, text in the middle of a line.
    lines
        The model folds white space (the library's default). Each line is encoded by itself, as the library trains.
        With a piece for the line break ("\\n" or the byte piece <0x0A>) that piece ends each line; without one the
        line breaks are lost: they become word boundaries, like any space. Runs of spaces, spaces at line ends and
        what the model's normalisation folds (NFKC: ligatures, full-width forms, ...) are lost, too.

    In both, a text's own U+2581, in which models write a space, becomes one; characters without a piece become the
    model's unknown piece unless it has byte fallback; and bytes that are no UTF-8 become U+FFFD.

    Raises:
        DataError: the model is missing or is none, or ``eod`` is asked of a model without an end-of-sentence id.
    """

    kind = "sentencepiece"
    cuts_bytes = False

    def __init__(self, model_path: str | Path, eod: bool = False) -> None:
        import sentencepiece

        self.model_path = Path(model_path)
        try:
            model = self.model_path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(model)
            self.vocab_size = self._processor.vocab_size()
        except FileNotFoundError:
            raise DataError(f"tokenizer model {model_path}: no such file") from None
        except OSError as error:
            if error.strerror:
                raise DataError(f"tokenizer model {model_path}: cannot be read ({error.strerror})") from None
            raise DataError(f"tokenizer model {model_path}: not a SentencePiece model") from None
        except (RuntimeError, ValueError):
            raise DataError(f"tokenizer model {model_path}: not a SentencePiece model") from None
        if self.vocab_size == 0:
            raise DataError(f"tokenizer model {model_path}: not a SentencePiece model")
        self.model_sha256 = hashlib.sha256(model).hexdigest()
        self.eod_id = self._processor.eos_id() if eod else None
        if self.eod_id == -1:
            raise DataError(f"tokenizer model {model_path}: has no end-of-sentence id, which --append-eod needs")
        self._leads = [(lead, self._processor.encode(lead)) for lead in _LEADS]
        self.exact = self._gives_back_white_space()
        self.newline_id = None if self.exact else self._newline_piece()
        self.newlines = "kept" if self.exact or self.newline_id is not None else "lost"
        self.unknown_tokens = 0

    def encoder(self) -> Encoder:
        return _SentencePieceEncoder(self)

    def decode(self, ids: np.ndarray) -> bytes:
        kept = ids[ids != self.eod_id] if self.eod_id is not None else ids
        if self.newline_id is None:
            return self._processor.decode(kept.tolist()).encode()
        lines = np.split(kept, np.flatnonzero(kept == self.newline_id))
        lines[1:] = [line[1:] for line in lines[1:]]
        return "\n".join(self._processor.decode(line.tolist()) for line in lines).encode()

    def encode_pieces(self, pieces: list[str], at_start: bool) -> np.ndarray:
        """The ids (1-D, int32) of consecutive pieces of a document; ``at_start`` when the first one opens it."""
        if self.exact:
            opening = 1 if at_start else 0
            lead, lead_ids = self._leads[0]
            encoded = self._processor.encode(pieces[:opening] + [lead + piece for piece in pieces[opening:]])
            for number in range(opening, len(pieces)):
                if encoded[number][: len(lead_ids)] == lead_ids:
                    del encoded[number][: len(lead_ids)]
                else:
                    encoded[number] = self._encode_inside(pieces[number])
            parts = [np.array(ids, np.int32) for ids in encoded]
        else:
            parts = []
            for piece, ids in zip(
                pieces, self._processor.encode([piece.rstrip("\n") for piece in pieces]), strict=True
            ):
                parts.append(np.array(ids, np.int32))
                if self.newline_id is not None and piece.endswith("\n"):
                    parts.append(np.array([self.newline_id], np.int32))
        ids = np.concatenate(parts)
        self.unknown_tokens += int(np.count_nonzero(ids == self._processor.unk_id()))
        return ids

    def cut(self, text: str, final: bool) -> tuple[list[str], str]:
        """Pieces of ``text`` to encode on their own, and the rest to keep for later; no rest when ``final``."""
        if self.exact:
            pieces = _cut(text, _PIECE_CHARACTERS)
            rest = pieces.pop()
            return ([*pieces, rest], "") if final and rest else (pieces, rest)
        lines = text.split("\n")
        rest = lines.pop()
        longest = 2 * _PIECE_CHARACTERS  # rather than cut a line, which is encoded as one
        pieces = [part for line in lines for part in _cut(line + "\n", longest)]
        if final or len(rest) > _PIECE_CHARACTERS:
            parts = _cut(rest, longest)
            rest = "" if final else parts.pop()
            pieces += parts
        return [piece for piece in pieces if piece], rest

    def _encode_inside(self, text: str) -> list[int]:
        """The ids of ``text`` as the continuation of another: without the prefix that the model puts before a text.

        A character in front takes that prefix and is cut off again; one that ``text`` does not merge with.
        """
        for lead, lead_ids in self._leads:
            ids = self._processor.encode(lead + text)
            if ids[: len(lead_ids)] == lead_ids:
                return ids[len(lead_ids) :]
        raise DataError(f"tokenizer model {self.model_path}: cannot encode a long text in pieces")

    def _gives_back_white_space(self) -> bool:
        encode = self._processor.encode
        return (
            all(self._processor.decode(encode(text)) == text for text in _PROBES)
            and encode("a\n") + self._encode_inside("b c") == encode("a\nb c")
            and encode("a b") + self._encode_inside(" c") == encode("a b c")
        )

    def _newline_piece(self) -> int | None:
        for piece in ("\n", "<0x0A>"):
            found = self._processor.piece_to_id(piece)
            if self._processor.id_to_piece(found) == piece:
                return found
        return None


class _SentencePieceEncoder:
    """The stream of one document's text through a SentencePieceTokenizer."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending: list[str] = []
        self._characters = 0
        self._at_start = True

    def feed(self, data: bytes) -> np.ndarray:
        # a row comes whole, whatever its size; ids are Python's integers for a while, which need much more memory
        parts = [self._take(data[start : start + _BATCH_BYTES]) for start in range(0, len(data), _BATCH_BYTES)]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _take(self, data: bytes) -> np.ndarray:
        text = self._decoder.decode(data)
        self._pending.append(text)
        self._characters += len(text)
        return self._encode(final=False) if self._characters >= _BATCH_CHARACTERS else np.empty(0, np.int32)

    def finish(self) -> np.ndarray:
        self._pending.append(self._decoder.decode(b"", final=True))
        return self._encode(final=True)

    def _encode(self, final: bool) -> np.ndarray:
        pieces, rest = self._tokenizer.cut("".join(self._pending), final)
        self._pending, self._characters = [rest], len(rest)
        if not pieces:
            return np.empty(0, np.int32)
        ids = self._tokenizer.encode_pieces(pieces, self._at_start)
        self._at_start = False
        return ids


def make_tokenizer(kind: str, model_path: str | Path | None = None, eod: bool = False) -> Tokenizer:
    """The tokenizer of a kind in ``KINDS``.

    Raises:
        DataError: the kind is unknown, or a model is missing, bad, or given for a kind that has none.
    """
    if kind == "bytes":
        if model_path is not None:
            raise DataError(f"tokenizer bytes takes no model, but {os.fspath(model_path)} was given")
        return ByteTokenizer(eod)
    if kind == "sentencepiece":
        if model_path is None:
            raise DataError("tokenizer sentencepiece needs a model: give one with --tokenizer-model")
        return SentencePieceTokenizer(model_path, eod)
    raise DataError(f"unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}")


def _cut(text: str, longest: int) -> list[str]:
    """``text`` in pieces that end in the last one, of at most ``longest`` characters; the others are cut off before it.

    Where the cuts are depends on the text from its start on, not on how much of it there is. Every character is copied
    once: a text of one long row is cut as fast as one of many.
    """
    pieces, start = [], 0
    while len(text) - start > longest:
        at = _cut_point(text, start)
        pieces.append(text[start:at])
        start = at
    return [*pieces, text[start:]]


def _cut_point(text: str, start: int) -> int:
    """Where to cut a piece from ``start`` on off ``text``, which is longer: after a line's end, else before a space.

    Never between two line breaks or two spaces, because a model may have a piece for several of them.
    """
    end = start + _PIECE_CHARACTERS
    for mark, offset in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, start + 1, end)
        while at > start:
            at += offset
            if text[at - 1 : at + 1] not in ("\n\n", "  "):
                return at
            at = text.rfind(mark, start + 1, at - offset)
    return end
