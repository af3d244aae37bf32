"""The report of planted recordings, as files and in a real browser."""

from __future__ import annotations

import argparse
import base64
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra analyze")
pytest.importorskip("jinja2", reason="needs the extra analyze")

from rmoe_megablocks.analysis import measuring, report
from rmoe_megablocks.analysis.report import arguments, curves, gallery, writing
from rmoe_megablocks.analysis.report.sample import sample
from rmoe_megablocks.errors import UsageError
from tests.analysis import browser
from tests.analysis.planted import Planted, routers

TOKENS, LAYERS, EXPERTS = 600, 2, 10
PLANTED = "<script>document.title='planted'</script>"
TEXTS = [PLANTED, "&amp;", "\n", '"', " the"] + [f" w{i}" for i in range(45)]


def planted(name, seed, recurrent):
    scores_TLE = routers(scale=2, layers=LAYERS, tokens=TOKENS, experts=EXPERTS, seed=seed)
    numbers = np.random.default_rng(seed).random((3, TOKENS, LAYERS), dtype=np.float32)
    columns = {"margin": numbers[0]} | ({"state_norm": numbers[1], "update_gate": numbers[2]} if recurrent else {})
    domain_T = np.where(np.arange(TOKENS) < 320, "prose", "code")
    made = Planted(scores_TLE, name=name, domain_T=domain_T, rows=100, **columns)
    made.vocabulary = dict(enumerate(TEXTS))
    return made


@pytest.fixture(scope="module")
def models():
    found = [planted("gru", 0, True), planted("<b>linear</b>", 1, False)]
    return found, [measuring.measure(one, measuring.Options(resamples=20)) for one in found]


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    return report.write(tmp_path_factory.mktemp("report") / "new", *models, tokens=400)


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
    if browser.found() is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    shown = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield shown
    shown.close()


def test_the_sample_has_what_the_recording_has():
    made = planted("gru", 0, True)
    found = sample(made, 400)
    assert {piece["domain"] for piece in found["pieces"]} == {"prose", "code"}
    assert 300 <= len(found["token"]) <= 400
    scores_TLE = np.frombuffer(base64.b64decode(found["scores"]), "<f2").reshape(-1, LAYERS, EXPERTS)
    for piece in found["pieces"]:
        rows = np.flatnonzero(made.arrays["window_T"] == piece["window"])[: piece["count"]]
        here = slice(piece["start"], piece["start"] + piece["count"])
        assert (scores_TLE[here] == made.arrays["scores_TLE"][rows]).all()
        assert found["token"][here] == made.arrays["token_T"][rows].tolist()
    assert found["reset_gate"] is None and found["state_norm"] is not None


def test_every_figure_is_there_with_its_chance(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r'<figure id="figure-(\w+)"', text)
    assert {"mutual_information", "transitions", "paths", "load", "update_gate", "domain_specialisation"} <= set(names)
    assert "reset_gate" not in names
    assert text.count("<b>Chance:</b>") == len(names)
    for name in names:
        assert (page.parent / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (page.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert (page.parent / "measures" / "gru" / "measures.json").is_file()


def test_lines_have_axes_with_units_a_legend_and_their_chance(models):
    entropy = curves.by_layer("entropy", models[1])
    (ax,) = entropy.axes
    assert ax.get_xlabel() and "nats" in ax.get_ylabel()
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert np.allclose(lines["chance"], np.log(EXPERTS))
    assert np.allclose(lines["gru"], models[1][0]["measures"]["entropy"]["value"])
    assert {text.get_text() for text in entropy.legends[0].get_texts()} == lines.keys()


def test_nothing_on_the_page_is_the_texts(page):
    text = page.read_text(encoding="utf-8")
    assert PLANTED not in text and "<b>linear" not in text
    assert text.count("<script") == 2
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)


def test_the_page_is_held_against_the_baseline_asked_for(models):
    assert writing._compared(models[1], "<b>linear</b>").labels[0] == "<b>linear</b>"
    assert writing._compared(models[1], "a run that is not shown").labels[0] == "gru"
    assert writing._compared(models[1][:1], None) is None
    seeds = [one | {"recording": one["recording"] | {"seed": seed}} for seed, one in enumerate(models[1])]
    assert "seeds of one setting" in writing._compared(seeds, None), "the page says why"


def test_the_page_stays_below_its_bound(models, monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(gallery, "entries", lambda: [])
    page = report.write(tmp_path, *models, tokens=400)
    assert page.stat().st_size < 90_000


def test_what_cannot_be_shown_is_one_line(tmp_path, models):
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-measures", action="store_true")
    arguments.add_arguments(parser)
    arguments.check(parser.parse_args([]), 9)
    file = tmp_path / "file"
    file.write_text("")
    for words, count, what in (
        (["--report", "r"], 5, "1 to 4 models"),
        (["--report", "r", "--report-tokens", "0"], 1, "--report-tokens 0"),
        (["--report", str(file)], 1, "a file of that name"),
        (["--report", "r", "--no-measures"], 1, "--no-measures"),
    ):
        with pytest.raises(UsageError, match=what):
            arguments.check(parser.parse_args(words), count)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(opened, page, width):
    opened.open(page, width)
    assert opened.run("document.documentElement.scrollWidth") <= width
    assert opened.run("document.title") == "Routing of gru, <b>linear</b>"
    assert opened.run("document.querySelector('.token').textContent") == PLANTED
    assert opened.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")

    # a click shows the token in both models
    opened.click('.panel .token[data-place="5"]')
    rows = opened.run("[...document.querySelectorAll('.details')].map(d => d.querySelectorAll('tbody tr').length)")
    assert rows == [LAYERS, LAYERS]
    cells = "[...document.querySelectorAll('.details td')]"
    inside = (
        f"{cells}.every(c => c.getBoundingClientRect().right <= c.closest('.details').getBoundingClientRect().right)"
    )
    assert opened.run(inside), "no number is cut off at the panel's edge"
    made = planted("gru", 0, True)
    first = opened.run("document.querySelector('#piece').value")
    window = int(re.findall(r"\d+", first)[-1])
    row = np.flatnonzero(made.arrays["window_T"] == window)[5]
    path = " – ".join(str(expert) for expert in made.arrays["choices_TLK"][row, :, 0])
    assert opened.run("document.querySelector('.path').textContent") == f"Path of best experts: {path}"
    expert = made.arrays["choices_TLK"][row, 0, 0]
    score = made.arrays["scores_TLE"][row, 0, expert]
    assert f"{expert} ({score:.3f})" in opened.run("document.querySelector('.details tbody tr').textContent")

    # another layer, other colours: those of its best experts
    colours = "[...document.querySelectorAll('.panel')[0].querySelectorAll('.token')].map(t => t.style.background)"
    before = opened.run(colours)
    opened.run("(() => { const s = document.querySelector('#layer-0'); s.value = 1; "
               "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert opened.run(colours) != before
    shown = opened.run(
        "[...document.querySelectorAll('.panel')[0].querySelectorAll('.token')].map(t => +t.dataset.expert)"
    )
    rows = np.flatnonzero(made.arrays["window_T"] == window)[: len(shown)]
    assert shown == made.arrays["choices_TLK"][rows, 1, 0].tolist()

    # keys alone reach a token
    opened.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
    opened.press("ArrowRight")
    opened.press("Enter")
    assert opened.run("document.querySelector('.token[aria-current]').dataset.place") == "6"

    # another piece of the text
    opened.run("(() => { const s = document.querySelector('#piece'); s.selectedIndex = s.options.length - 1; "
               "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert opened.run("document.querySelectorAll('.token[aria-current]').length") == 0
    assert opened.problems == []
    assert {url.split(":")[0] for url in opened.requests} <= {"file", "data"}
    assert [url for url in opened.requests if url.startswith("file:")] == [page.as_uri()] * (1 if width == 1280 else 2)
