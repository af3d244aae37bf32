"""The curve of mutual information against flatness, and what the shuffled baseline leaves of it."""

import numpy as np
import pytest

from studies.information_flatness.__main__ import SCALES, curve, draw, main, table


def test_the_baseline_removes_what_flatness_alone_gives(tmp_path):
    rows = curve(SCALES, 1500, 16)
    independent = np.array([row["independent"] for row in rows])
    peak = int(independent.argmax())
    assert 0 < peak < len(rows) - 1, "neither the flattest nor the sharpest gates"
    assert independent[0] < 0.1 and independent[peak] > 1.3 and independent[-1] < 0.2
    assert np.abs([row["above"] for row in rows]).max() < 0.03
    for row in rows:
        assert row["shuffled"] - 0.03 < row["half"] <= row["copied"]
        assert row["half"] == pytest.approx((row["copied"] + row["shuffled"]) / 2, abs=0.04)
    pytest.importorskip("matplotlib")
    chart = draw(rows, tmp_path / "curve.svg")
    (axes,) = chart.axes
    assert "nats" in axes.get_ylabel() and "deviation" in axes.get_xlabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 5 and (tmp_path / "curve.svg").stat().st_size > 10_000
    assert len(table(rows).splitlines()) == len(SCALES) + 2


def test_bad_arguments_are_one_line(capsys, tmp_path):
    assert main(["--experts", "1"]) == 2
    assert main(["--figure", str(tmp_path / "none/a.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
