import pytest

from rmoe_megablocks.data import DataError
from rmoe_megablocks.data.split import parse_split


@pytest.mark.parametrize(
    ("spelling", "total", "ends"),
    [
        ("90000000,5000000,5000000", 10**8, (90_000_000, 95_000_000, 10**8)),
        ("90M/5M/5M", 10**8, (90_000_000, 95_000_000, 10**8)),
        ("90M,5M,5M", 10**8 + 7, (90_000_000, 95_000_000, 10**8)),
        ("90_000_000, 5mb, 5M", 10**8, (90_000_000, 95_000_000, 10**8)),
        ("1.5k,1Ki,0", 4000, (1500, 2524, 2524)),
        ("90B,5B,5B", 200, (90, 95, 100)),
        ("90,5,5", 100, (90, 95, 100)),
        ("90%,5%,5%", 1_000_001, (900_001, 950_001, 1_000_001)),
        ("0.9,0.05,0.05", 10**8, (90_000_000, 95_000_000, 10**8)),
        ("0.9/0.05/.05", 10**15 + 1, (900_000_000_000_001, 950_000_000_000_001, 10**15 + 1)),
        ("100%,0,0", 7, (7, 7, 7)),
        ("1,0,0", 7, (7, 7, 7)),
        ("10%,5%,5%", 100, (10, 15, 20)),
    ],
)
def test_ends(spelling, total, ends):
    assert parse_split(spelling).ends(total) == ends


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("90M,5M", "'90M,5M' is not understood"),
        ("a,b,c", "'a,b,c' is not understood"),
        ("90M,5M,-5M", "not understood"),
        ("", "not understood"),
        ("90%,5M,5M", "mixes shares and sizes"),
        ("0,5M,5M", "leaves train empty"),
        ("90%,10%,5%", "'90%,10%,5%' sums to 1.05 of the input"),
        ("0.9,0.1,0.1", "sums to 1.1 of the input"),
        ("1.0001k,1,1", "no whole number of bytes"),
    ],
)
def test_wrong_spellings(spelling, says):
    with pytest.raises(DataError, match=says) as error:
        parse_split(spelling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spelling", "total", "says"),
    [
        ("90M,5M,5M", 10**8 - 1, "'90M,5M,5M' needs 100,000,000 bytes, but the input has 99,999,999"),
        # Megatron's weights, taken for bytes, would train on next to nothing
        ("969,30,1", 10**6, "would take 1000 bytes of 1,000,000"),
        ("90,5,5", 10**6, "would take 100 bytes of 1,000,000"),
        ("8,1,1", 10**6, "would take 10 bytes of 1,000,000"),
        ("98,1,0", 10**6, "would take 99 bytes of 1,000,000"),
        ("98%,1%,1%", 10, "leaves valid empty: the input has 10 bytes"),
    ],
)
def test_splits_that_do_not_fit(spelling, total, says):
    with pytest.raises(DataError, match=says):
        parse_split(spelling).ends(total)
