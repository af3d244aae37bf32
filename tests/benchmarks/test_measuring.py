"""Quantiles, pairing, intervals and verdicts on times whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks.measuring import quantiles
from benchmarks.measuring.quantiles import Estimate, estimate, why_no_verdict


def test_quantiles():
    assert quantiles.quantiles([10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 5, 8)
    assert quantiles.quantiles([1.0, 2.0]) == pytest.approx((1.2, 1.5, 1.8))


def test_turns():
    assert list(quantiles.turns("AB", 4)) == [["A", "B"], ["B", "A"], ["A", "B"], ["B", "A"]]
    assert [name for order in quantiles.turns("ABC", 2) for name in order] == list("ABCCBA")


def test_ratios_are_of_one_round():
    """A machine that becomes three times as slow: pairs say 1.1, and so does their median, whatever the times do."""
    drift = np.linspace(1, 3, 101)
    ours, theirs = list(1.1 * drift), list(drift)
    found = estimate(quantiles.ratios(ours, theirs))
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1), abs=1e-12)
    mixed = estimate(quantiles.ratios(ours, theirs[::-1]))  # other pairs, no answer
    assert mixed.high - mixed.low > 0.1
    assert quantiles.differences([3.0, 5.0], [1.0, 6.0]) == [2.0, -1.0]
    with pytest.raises(ValueError, match="shorter"):
        quantiles.ratios([1.0, 2.0], [1.0])


def test_the_interval_of_a_median():
    """Of 400 normal values the median's standard error is 1.2533 sigma / sqrt(n)."""
    values = np.random.default_rng(0).normal(1.02, 0.02, 400)
    found = estimate(values)
    expected = 2 * 1.96 * 1.2533 * 0.02 / math.sqrt(400)
    assert found.low < 1.02 < found.high and 0.7 * expected < found.high - found.low < 1.4 * expected
    assert found.median == np.median(values)


def test_the_interval_covers():
    """In 19 of 20 experiments the truth lies inside; here of 60."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        found = estimate(generator.exponential(1.0, 50))
        inside += found.low <= math.log(2) <= found.high
    assert 52 <= inside <= 60


def test_a_single_value_has_no_interval():
    found = estimate([2.0])
    assert found.median == 2.0 and math.isnan(found.low) and found.text() == "2.000"


def test_slope():
    """Twenty a model of four layers, eleven one of two: four and a half a layer, give or take the noise."""
    generator = np.random.default_rng(0)
    deep, shallow = 20 + generator.normal(0, 1, 200), 11 + generator.normal(0, 1, 200)
    found = quantiles.slope(deep, shallow, 2)
    assert found.low < 4.5 < found.high and found.high - found.low < 0.5
    assert found.median == pytest.approx((np.median(deep) - np.median(shallow)) / 2)


@pytest.mark.parametrize(
    ("control", "why"),
    [
        (Estimate(1.0, 0.99, 1.01), None),
        (Estimate(1.004, 0.999, 1.01), None),
        (Estimate(1.002, 1.001, 1.003), "leaves out 1"),
        (Estimate(0.998, 0.997, 0.999), "leaves out 1"),
        (Estimate(1.006, 0.99, 1.02), "off by more than 0.5%"),
        (Estimate(0.994, 0.98, 1.02), "off by more than 0.5%"),
        (Estimate(1.0, math.nan, math.nan), "no interval"),
    ],
)
def test_a_control_that_is_off(control, why):
    found = why_no_verdict(control, 0.005)
    assert found is why if why is None else why in found
