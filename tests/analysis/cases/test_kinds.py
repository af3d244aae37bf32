"""Models and recordings of every kind through the command to the page: what is there is shown, nothing else is."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pip install 'rmoe-megablocks[analyze]'")
pytest.importorskip("matplotlib", reason="pip install 'rmoe-megablocks[analyze]'")
pytest.importorskip("jinja2", reason="pip install 'rmoe-megablocks[analyze]'")

from rmoe_megablocks import cli
from rmoe_megablocks.analysis import measuring, report
from rmoe_megablocks.analysis.recording.recorders import checkpoints
from rmoe_megablocks.analysis.report import curves, gallery, maps, writing
from tests.analysis import browser
from tests.analysis.planted import Planted, routers, written

FEW = measuring.Options(resamples=20)


@pytest.fixture
def drawn(monkeypatch):
    """Draws these figures alone, in few dots."""

    def choose(*names):
        kept = [entry for entry in gallery.entries() if entry.name in names]
        assert len(kept) == len(names)
        monkeypatch.setattr(gallery, "entries", lambda: kept)
        monkeypatch.setattr(writing, "DOTS", (40,))

    return choose


def analyze(*words) -> int:
    return cli.main(["analyze", *map(str, words), "--resamples", "20"])


def shown(page):
    """The samples of a page, its text, and the names of its figures."""
    text = (page / "index.html").read_text(encoding="utf-8")
    samples = re.search(r'<script type="application/json" id="samples">(.*?)</script>', text, re.DOTALL)
    return json.loads(samples.group(1)), text, re.findall(r'<figure id="figure-(\w+)"', text)


def test_models_of_four_kinds_are_recorded_measured_and_shown(tmp_path, drawn, capsys):
    """From folders: null experts, sigmoid scores, 24 experts, one layer alone."""
    pytest.importorskip("transformers", reason="pip install 'rmoe-megablocks[hf]'")
    from tests.evaluation.made import TEXT, folder

    drawn("mutual_information", "load")
    (tmp_path / "text").write_bytes(TEXT * 3)
    kinds = {
        "null": ("gru", {"num_null_experts": 2}),
        "sigmoid": ("gru", {"router_score_function": "sigmoid", "router_enable_expert_bias": True}),
        "wide": ("linear", {"num_experts": 24}),
        "alone": ("lstm", {"moe_layer_freq": [0, 0, 1, 0, 0]}),
    }
    models = [folder(tmp_path / name, kind, **changes) for name, (kind, changes) in kinds.items()]
    words = ["--data", f"wiki={tmp_path / 'text'}", "--out", tmp_path / "out", "--report", tmp_path / "page"]
    assert analyze(*models, *words) == 0
    out, err = capsys.readouterr()
    assert "rmoe: alone has one layer with experts: nothing compares layers" in err
    assert "Warning: experts differs (24, 4)" in out
    samples, text, figures = shown(tmp_path / "page")
    assert figures == ["mutual_information", "load"] and [one["name"] for one in samples] == list(kinds)
    assert [(one["nulls"], one["score"], one["experts"], len(one["layers"])) for one in samples] == [
        (2, "softmax", 4, 3), (0, "sigmoid", 4, 3), (0, "softmax", 24, 3), (0, "softmax", 4, 1)]  # fmt: skip
    assert "<b>Warning:</b> experts differs (24, 4)" in text and "4 and 2 null" in text and "gru, sigmoid" in text
    found = {name: json.loads((tmp_path / "out" / name / "measures.json").read_text()) for name in kinds}
    for name, one in found.items():
        between = {"transitions", "paths", "predictability"}
        assert (between <= one["left_out"].keys()) == (name == "alone"), name
    for name in ("null", "sigmoid", "wide"):
        figure, share = (found[name]["figures"][f"mutual_information{end}"] for end in ("", "_adjusted"))
        said = f"{name} {figure['value']:.3f} nats, {figure['chance']:.3f} by chance, {share['value']:.3f} adjusted"
        assert said in text
    assert not re.search(r"alone [\d.]+ nats", text)


def test_every_figure_can_be_drawn_of_every_kind():
    """Many experts, null ones, one layer, other layers and domains: beside each other, and alone."""
    domain = np.where(np.arange(640) < 320, "code", "prose")
    null = routers(layers=3, tokens=640, experts=4)
    chosen = np.where(null.astype(float).argsort(-1)[..., :2] == 3, -1, null.astype(float).argsort(-1)[..., :2])
    made = [
        Planted(routers(layers=12, tokens=640, experts=40), name="many", domain_T=domain),
        Planted(null, name="null", choices_TLK=chosen.astype(np.int16), null_experts=2),
        Planted(routers(layers=1, tokens=640, experts=8), name="alone", domain_T=np.repeat(["a", "b", "c", "d"], 160)),
        Planted(routers(layers=2, tokens=640, experts=4), 1, name="one choice", score_function="sigmoid"),
    ]
    measured = [measuring.measure(one, FEW) for one in made]
    for models in (measured, measured[2:3], measured[3:]):
        for entry in gallery.entries():
            figure = entry.build(models)
            if figure is not None:
                assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes), entry.name
                assert gallery.caption(entry, models)["chance"], entry.name
    drawn = maps.transitions(measured)
    assert [ax.get_title() for ax in drawn.axes[:-1]] == [
        "many, layer 1 to 2", "many, layer 6 to 7", "many, layer 11 to 12", "null, layer 1 to 2", "null, layer 2 to 3",
        "one choice, layer 1 to 2"]  # fmt: skip
    rows = {ax.get_title().split(",")[0]: ax.get_subplotspec().rowspan.start for ax in drawn.axes[:-1]}
    assert rows == {"many": 0, "null": 1, "one choice": 2}, "a row a model"
    legends = [ax.get_legend() is not None for ax in curves.coverage(measured).axes]
    assert legends == [True] * 4, "layers differ, so that one legend does not fit all"


def test_the_information_stands_beside_chance_and_with_it_taken_off():
    scores = routers(layers=2, tokens=2000)
    scores[::2, 1] = scores[::2, 0]
    measured = measuring.measure(Planted(scores, name="half"), FEW)
    figure = maps.information([measured])
    panels = {ax.get_title().removeprefix("half, "): ax for ax in figure.axes if ax.images}
    assert list(panels) == ["as measured", "by chance", "adjusted"]
    found = {name: float(ax.images[0].get_array()[0, 1]) for name, ax in panels.items()}
    chance = measured["figures"]["mutual_information"]["chance"]
    assert found["as measured"] > found["by chance"] + 0.2 and found["by chance"] == pytest.approx(chance, abs=0.02)
    assert found["adjusted"] == pytest.approx(0.5, abs=0.03)
    assert [text.get_text() for text in panels["adjusted"].texts][1] == f"{found['adjusted']:.3f}"[1:]
    bars = [ax.get_ylabel() for ax in figure.axes if not ax.images]
    assert "(nats)" in " ".join(bars) and "(MI - chance) / (entropy - chance)" in bars


def test_transitions_go_from_the_row_to_the_column():
    """Expert i is always followed by the next one: the row's number is this layer's, the column's the next layer's."""
    chosen = np.random.default_rng(0).integers(0, 4, (512, 1, 1))
    chosen = np.concatenate([chosen, (chosen + 1) % 4], axis=1).astype(np.int16)
    measured = measuring.measure(Planted(routers(layers=2, tokens=512, experts=4), choices_TLK=chosen), FEW)
    ax = maps.transitions([measured]).axes[0]
    assert ax.get_ylabel() == "expert of layer 1" and ax.get_xlabel() == "expert of layer 2"
    assert np.argmax(ax.images[0].get_array(), axis=1).tolist() == [1, 2, 3, 0]
    loads = np.bincount(chosen[:, 1, 0], minlength=4) / 512
    assert float(ax.images[0].get_array()[0, 1]) == pytest.approx(1 - loads[1]), "less the next layer's loads"


def test_who_is_chosen_together_is_told_of_the_row():
    """Expert 0 is never without expert 1, which is without it half of the time."""
    chosen = np.tile(np.array([[0, 1], [1, 2]], np.int16), (256, 1))[:, None]
    measured = measuring.measure(Planted(routers(layers=1, tokens=512, experts=4), choices_TLK=chosen), FEW)
    ax = maps.coactivation([measured]).axes[0]
    found = ax.images[0].get_array()
    assert ax.get_ylabel() == "expert i" and ax.get_xlabel() == "expert j"
    assert [float(found[place]) for place in ((0, 1), (1, 0))] == pytest.approx([1 - 1 / 3, 0.5 - 1 / 3])
    assert found.mask[0, 0] and found.mask[3].all(), "nobody chose expert 3"


def test_several_checkpoints_of_two_runs(tmp_path, drawn, monkeypatch):
    """What --steps finds is recorded, the last one is held against all; the launcher is left out."""
    first, last = routers(layers=2, tokens=640, seed=1), routers(layers=2, tokens=640, seed=2)
    middle = np.where((np.arange(640) % 2 == 0)[:, None, None], first, last)
    of_step = {100: first, 200: middle, 1000: last}

    def record(args, above, step, name, target, data):
        written(target, Planted(of_step[step], name=name, iteration=step, router_type=above.parent.name))
        return True

    monkeypatch.setattr(checkpoints, "record", record)
    drawn("saturation", "load_over_training")
    for run in ("gru", "linear"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1000")
        for step in of_step:
            (tmp_path / run / "checkpoints" / f"iter_{step:07}").mkdir()
    (tmp_path / "text").write_text("a text")
    words = ["--data", tmp_path / "text", "--out", tmp_path / "out", "--report", tmp_path / "page", "--steps", "all"]
    assert analyze(*(tmp_path / run / "checkpoints" for run in ("gru", "linear")), *words) == 0
    measures = {
        place.parent.name: json.loads(place.read_text())["measures"] for place in tmp_path.glob("out/*/measures.json")
    }
    assert len(measures) == 6
    assert {name for name, one in measures.items() if "saturation" in one} == {"gru-1000", "linear-1000"}
    saturation = measures["gru-1000"]["saturation"]
    assert saturation["coordinates"]["step"] == [100, 200, 1000]
    value, by_chance = np.array(saturation["value"]), np.array(saturation["baseline"])
    assert value[0] == pytest.approx(by_chance[0], abs=0.03) and value[2].tolist() == [1, 1]
    assert value[1] == pytest.approx((1 + by_chance[1]) / 2, abs=0.03)
    loads = measures["gru-1000"]["load_over_training"]["value"]
    assert loads[0] == measures["gru-100"]["load"]["value"] and loads[2] == measures["gru-1000"]["load"]["value"]
    samples, text, figures = shown(tmp_path / "page")
    assert figures == ["saturation", "load_over_training"] and 'href="#over-training"' in text
    assert [one["name"] for one in samples] == ["gru-1000", "linear-1000"], "of each run the last one"
    measured = [measuring.read(tmp_path / "out" / "gru-1000")]
    (ax,) = curves.over_training("saturation", measured).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["layer 2"].get_xdata().tolist() == [100, 200, 1000]
    assert lines["layer 2"].get_ydata() == pytest.approx(value[:, 1])
    assert lines["chance, mean of layers"].get_ydata() == pytest.approx(by_chance.mean(1))


def test_an_odd_page_in_a_browser(tmp_path, drawn):
    """Null experts, unknown tokens, 40 experts, one layer: on a small screen all of it fits or says it does not."""
    if browser.found() is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    drawn("mutual_information", "coverage")
    scores = routers(0.1, layers=2, tokens=256, experts=6)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :2].astype(np.int16)
    chosen[3] = [[-1, 2], [4, -1]]
    names = ("margin", "state_norm", "update_gate", "reset_gate")
    two, five, one = ({name: np.full((256, layers), 0.5, np.float32) for name in names} for layers in (2, 5, 1))
    made = [
        Planted(scores * 0.75, choices_TLK=chosen, null_experts=2, name="null", **two),
        Planted(routers(layers=5, tokens=256, experts=40), 8, name="many", **five),
        Planted(routers(layers=1, tokens=256), name="unknown", token_T=np.full(256, -1, np.int32), **one),
    ]
    page = report.write(tmp_path / "page", made, [measuring.measure(model, FEW) for model in made], tokens=100)
    shown = browser.Browser(tmp_path / "profile")
    try:
        for width in (1280, 390):
            shown.open(page, width)
            for panel in range(3):
                shown.click(f'.panel:nth-child({panel + 1}) .token[data-place="3"]')
            assert shown.run("document.documentElement.scrollWidth") <= width
            boxes = "[...document.querySelectorAll('.details, .details table, .bars')]"
            assert shown.run(f"{boxes}.every(e => e.scrollWidth <= e.clientWidth)"), "the details fit into their panel"
            cells = "[...document.querySelectorAll('.details td')]"
            assert shown.run(f"{cells}.every(e => e.getBoundingClientRect().right <= innerWidth)")
            hints = shown.run("[...document.querySelectorAll('.hint')].filter(e => !e.hidden).length")
            more = shown.run("document.querySelectorAll('.box.more').length")
            assert hints == more and (hints > 0) == (width == 390), "what is wider than the screen says so"
        assert shown.run("document.querySelector('.path').textContent") == "Path of best experts: null – 4"
        row = shown.run("document.querySelector('.details tbody tr').textContent")
        assert row.startswith(f"1null, 2 ({made[0].arrays['scores_TLE'][3, 0, 2]:.3f})")
        # flat scores over 6 experts and 2 null ones are 1/8, which is half of the full height, 1/4
        assert shown.run("document.querySelector('.bars i').style.bottom") == "20px"
        assert "full height is 0.25; dashed: flat scores, 1/(6 + 2 null)" in shown.run(
            "document.querySelector('.details').textContent"
        )
        assert shown.run("document.querySelectorAll('.panel')[2].querySelector('.token').textContent") == "▢"
        assert "was not recorded" in shown.run("document.querySelectorAll('.details')[2].textContent")
        assert shown.problems == []
    finally:
        shown.close()
