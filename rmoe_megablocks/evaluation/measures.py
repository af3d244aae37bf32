"""From nats of tokens to the figures that papers give: bits per byte and character, perplexity of tokens and words."""

import io
import math
from dataclasses import dataclass

LEADS = bytes(byte for byte in range(256) if byte & 0xC0 != 0x80)  # what UTF-8 begins a character with


@dataclass(frozen=True)
class Counts:
    """What a text holds, all of it; None where that is not known.

    Attributes:
        bytes: of the text as it was given.
        characters: Unicode's code points.
        words: what white space (of ASCII) separates, as WikiText counts them: "@-@", "<unk>" and "=" are words.
        lines: ends of lines, each of which is a token of its own, <eos>, in results on WikiText at word level.
    """

    bytes: int
    characters: int | None = None
    words: int | None = None
    lines: int | None = None


def count(text: bytes) -> Counts:
    """Counts ``text``, which may begin and end within a character; characters are None if it is not UTF-8."""
    words = lines = 0
    for line in io.BytesIO(text):
        words += len(line.split())
        lines += line.endswith(b"\n")
    return Counts(len(text), _characters(text), words, lines)


def _characters(text: bytes) -> int | None:
    """Those that begin in ``text``: a split cut between any two bytes has part of a character at either end."""
    tail = text[:3].lstrip(bytes(range(0x80, 0xC0)))
    whole = tail + text[3:]
    for cut in range(4):  # a character has at most four bytes
        try:
            whole[: len(whole) - cut].decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return None
            continue
        return len(whole.translate(None, bytes(set(range(256)) - set(LEADS))))
    return None


def figures(nats: float, predicted: int, tokens: int, counts: Counts) -> dict[str, float | None]:
    """All measures of ``predicted`` tokens of a text of ``tokens`` tokens and ``counts``.

    The predicted tokens have their share of the text's bytes, characters and words. The first token of a text, which
    nothing predicts, thus counts as the mean of the others. None: not known, or larger than a number can be.

    Args:
        nats: sum of -ln p over the predicted tokens.
        predicted: number of them.

    Returns:
        nats_per_token; token_perplexity = exp of it; bits_per_byte (what enwik8 results call BPC);
        bits_per_character; word_perplexity with words and ends of lines as the number of words, WikiText's own;
        word_perplexity_without_line_ends with words alone.
    """
    mean = nats / predicted
    total = mean * tokens
    with_ends = None if counts.words is None else counts.words + counts.lines
    return {
        "bits_per_byte": _each(total / math.log(2), counts.bytes),
        "bits_per_character": _each(total / math.log(2), counts.characters),
        "nats_per_token": mean,
        "token_perplexity": _exp(mean),
        "word_perplexity": _exp(_each(total, with_ends)),
        "word_perplexity_without_line_ends": _exp(_each(total, counts.words)),
    }


def _each(total: float, number: int | None) -> float | None:
    return total / number if number else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < 700 else None
