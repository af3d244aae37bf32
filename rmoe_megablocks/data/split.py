"""How a corpus is cut into train, valid and test: the spellings of ``--split`` and the cuts they mean.

Sizes
    ``90000000,5000000,5000000``, ``90M/5M/5M`` or ``90M,5M,5M``; suffixes k, M, G (powers of 1000), Ki, Mi, Gi
    (powers of 1024), each with or without a B. They may leave bytes at the end of the input unused.
Shares
    ``90%,5%,5%`` or ``0.9,0.05,0.05``; of the whole input, at most 100 %.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from rmoe_megablocks.data.errors import DataError

SPLITS = ("train", "valid", "test")

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_PART = re.compile(r"(\d[\d_]*(?:\.\d*)?|\.\d+)\s*(%|(?:[kmg]i?)?b?)", re.IGNORECASE)
_LARGEST_WEIGHTS = 1000  # sizes without a unit that sum to no more look like weights
_EXPECTED = "expected three sizes (90M,5M,5M) or three shares (90%,5%,5% or 0.9,0.05,0.05) for train, valid, test"


@dataclass(frozen=True)
class Split:
    """A parsed split; ``parts`` are bytes when ``exact``, else shares of the input that sum to at most 1."""

    spelling: str
    exact: bool
    parts: tuple[Fraction, Fraction, Fraction]

    def ends(self, total: int) -> tuple[int, int, int]:
        """Where each split ends, in bytes from the start of an input of ``total`` bytes.

        Raises:
            DataError: the split asks for more than there is, or a part that was asked for is less than a byte.
        """
        if self.exact:
            ends = tuple(int(end) for end in accumulate(self.parts))
            if ends[-1] > total:
                raise DataError(f"split {self.spelling!r} needs {ends[-1]:,} bytes, but the input has {total:,}")
            if ends[-1] <= _LARGEST_WEIGHTS < total and not re.search("[a-z]", self.spelling.lower()):
                # Megatron's own --split takes such weights; silently training on 90 bytes would be worse than asking
                raise DataError(
                    f"split {self.spelling!r} would take {ends[-1]} bytes of {total:,}: "
                    "write shares with a % (90%,5%,5%), or sizes with a B (90B,5B,5B) if bytes are meant"
                )
        else:
            ends = tuple(round(end * total) for end in accumulate(self.parts))
        for name, part, start, end in zip(SPLITS, self.parts, (0, *ends), ends, strict=False):
            if part > 0 and start == end:
                raise DataError(f"split {self.spelling!r} leaves {name} empty: the input has {total:,} bytes")
        return ends


def parse_split(spelling: str) -> Split:
    """Read a spelling of ``--split``; the module's docstring lists them.

    Raises:
        DataError: the spelling is none of them, train is empty, or shares sum to more than 100 %.
    """
    texts = [text.strip() for text in re.split(r"[,/]", spelling)]
    matches = [_PART.fullmatch(text) for text in texts]
    if len(texts) != len(SPLITS) or not all(matches):
        raise DataError(f"split {spelling!r} is not understood: {_EXPECTED}")
    numbers = [Fraction(match[1].replace("_", "")) for match in matches]
    units = [match[2].lower() for match in matches]

    # "0" is the same in every unit; "1,0,0" can only mean shares, as nobody trains on one byte
    bare = all(unit == "" for unit in units)
    shares = bare and (any("." in text for text in texts) or max(numbers) <= 1)
    percent = not shares and all(unit == "%" for unit, number in zip(units, numbers, strict=True) if number > 0)
    if not percent and "%" in units:
        raise DataError(f"split {spelling!r} mixes shares and sizes: {_EXPECTED}")
    if numbers[0] == 0:
        raise DataError(f"split {spelling!r} leaves train empty: {_EXPECTED}")

    if shares or percent:
        parts = [number / 100 if percent else number for number in numbers]
        if sum(parts) > 1:
            raise DataError(f"split {spelling!r} sums to {float(sum(parts)):.6g} of the input, more than all of it")
    else:
        parts = [number * _FACTORS[unit.removesuffix("b")] for number, unit in zip(numbers, units, strict=True)]
        if any(part.denominator != 1 for part in parts):
            raise DataError(f"split {spelling!r} has a size that is no whole number of bytes")
    return Split(spelling, exact=not (shares or percent), parts=tuple(parts))
