"""Measured recordings beside each other, and on disk."""

import csv
import json

import numpy as np
import pytest

from rmoe_megablocks.analysis import measuring
from rmoe_megablocks.errors import UsageError
from tests.analysis.planted import Planted, routers, softmax

OPTIONS = measuring.Options(resamples=200, batch_tokens=512)


def measured(name, kind, scale=1.0, seed=None, draw=0, **more):
    return measuring.measure(
        Planted(routers(scale, layers=3, tokens=2048, seed=draw), name=name, router_type=kind, seed=seed, **more),
        OPTIONS,
    )


@pytest.fixture(scope="module")
def pair():
    return [measured("one", "gru", 1.0), measured("two", "linear", 1.6)]


def row(found, figure, group):
    frame = found.frame
    return frame[(frame.figure == figure) & (frame.group == group)].iloc[0]


def test_one_seed_each_has_intervals_over_windows(pair):
    found = measuring.compare(pair)
    assert found.labels == ["linear", "gru"] and not found.warnings
    entropy = row(found, "entropy", "gru")
    assert entropy.over == "windows" and entropy.low < entropy.difference < entropy.high
    expected = pair[0]["figures"]["entropy"]["value"] - pair[1]["figures"]["entropy"]["value"]
    assert entropy.difference == pytest.approx(expected) and entropy.low > 0
    above = row(found, "mutual_information_adjusted", "gru")
    assert above.low < 0 < above.high, "independent layers, however flat"
    assert row(found, "predictability", "gru").isna()[["over", "low", "high"]].all()
    assert "one seed a model" in found.note and "does not show how much another seed" in " ".join(found.text().split())
    assert "drawn for all models together" in found.note


def test_the_interval_is_as_wide_as_other_texts_are_different():
    """The deviation of texts of one router is what the interval over windows stands for."""
    few = measuring.Options(resamples=1)
    texts = [
        measuring.measure(Planted(routers(layers=3, tokens=2048, seed=draw)), few)["figures"]["entropy"]["value"]
        for draw in range(10, 26)
    ]
    ours = measuring.measure(Planted(routers(layers=3, tokens=2048)), OPTIONS)["bootstrap"]["values"]["entropy"]
    assert np.std(ours) == pytest.approx(np.std(texts, ddof=1), rel=0.5)


def test_pairs_of_one_text_have_a_narrower_interval_than_two_texts(pair):
    """The same text with one router's logits a little sharper: blocks are drawn for both together."""
    logits = np.random.default_rng(0).standard_normal((4096, 3, 16)) * np.linspace(0.5, 2, 4096)[:, None, None]
    both = [
        measuring.measure(Planted(softmax(logits * by), name=name, router_type=name), OPTIONS)
        for name, by in (("linear", 1.0), ("gru", 1.01))
    ]
    together = row(measuring.compare(both), "entropy", "gru")
    both[0]["recording"]["data"][0]["sha256"] = "another"
    found = measuring.compare(both)
    apart = row(found, "entropy", "gru")
    assert apart.high - apart.low > 5 * (together.high - together.low)
    assert found.warnings == ["the recordings are of different texts, so figures differ by what was read too"]
    assert "drawn for each model" in found.note


def test_several_seeds_are_a_group_and_have_intervals_over_seeds():
    several = [measured(f"{kind}-{seed}", kind, scale, seed, draw=seed) for seed in (1, 2, 3)
               for kind, scale in (("gru", 1.0), ("linear", 1.6))]  # fmt: skip
    found = measuring.compare(several)
    assert found.labels == ["linear", "gru"]
    entropy = row(found, "entropy", "gru")
    values = {one["recording"]["name"]: one["figures"]["entropy"]["value"] for one in several}
    assert entropy.seeds == 3 and entropy.over == "3 seeds"
    assert entropy.value == pytest.approx(np.mean([values[f"gru-{seed}"] for seed in (1, 2, 3)]))
    assert entropy.sd == pytest.approx(np.std([values[f"gru-{seed}"] for seed in (1, 2, 3)], ddof=1))
    assert entropy.difference == pytest.approx(
        np.mean([values[f"gru-{seed}"] - values[f"linear-{seed}"] for seed in (1, 2, 3)])
    )
    assert "pairs of one seed" in found.note and "±" in found.text()
    lone = measuring.compare([*several[:2], several[2]])
    assert row(lone, "entropy", "gru").low is None or np.isnan(row(lone, "entropy", "gru").low), "one pair, no interval"


def test_the_table_has_80_columns_and_names_every_model(pair):
    three = [*pair, measured("a-rather-long-name-of-a-folder-with-a-checkpoint-in-it-" * 3, "gru", 2.0, iteration=7)]
    text = measuring.compare(three).text()
    assert max(map(len, text.splitlines())) <= 80
    assert [line[:4] for line in text.splitlines()[:3]] == ["A = ", "B = ", "C = "]
    assert "Warning: iteration differs (100, 7)" in text


def test_what_cannot_be_compared_is_refused(pair):
    with pytest.raises(UsageError, match="two measured recordings or more"):
        measuring.compare(pair[:1])
    with pytest.raises(UsageError, match="two recordings are named one"):
        measuring.compare([pair[0], pair[0]])
    with pytest.raises(UsageError, match="--baseline lstm: the groups are gru; linear"):
        measuring.compare(pair, "lstm")
    with pytest.raises(UsageError, match=r"seeds of one setting \(gru\)"):
        measuring.compare([measured("a", "gru", seed=1), measured("b", "gru", seed=2)])


def test_few_windows_have_no_interval():
    few = measuring.measure(Planted(routers(tokens=256)), OPTIONS)
    assert few["bootstrap"]["values"] == {} and few["bootstrap"]["why_not"] == "4 blocks of windows are too few"
    found = measuring.compare([few, measured("two", "linear")])
    assert found.frame.low.isna().all() and "recordings have different numbers of tokens" in " ".join(found.warnings)


def test_written_measures_are_read_back(pair, tmp_path):
    written = measuring.write(pair[0], tmp_path / "out")
    assert measuring.read(tmp_path / "out") == pair[0] == json.loads((tmp_path / "out/measures.json").read_text())
    assert {path.stem for path in written} == {"measures", *pair[0]["measures"]}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in written)
    with (tmp_path / "out/transitions.csv").open() as file:
        rows = list(csv.DictReader(file))
    measure = pair[0]["measures"]["transitions"]
    assert len(rows) == 2 * 16 * 16
    for one in rows[::97]:
        place = int(one["layer"]) - 1, int(one["expert"]), int(one["next_expert"])
        for column, key in (("value", "value"), ("baseline", "baseline")):
            expected = measure[key][place[0]][place[1]][place[2]]
            assert float(one[column]) == pytest.approx(expected)


def test_tables_have_what_else_belongs_to_a_value(pair, tmp_path):
    measuring.write(pair[0], tmp_path)
    with (tmp_path / "mutual_information.csv").open() as file:
        rows = {(int(one["layer"]), int(one["other_layer"])): one for one in csv.DictReader(file)}
    measure = pair[0]["measures"]["mutual_information"]
    assert len(rows) == 9 and float(rows[1, 1]["adjusted"]) == pytest.approx(1)
    for key in ("value", "baseline", "adjusted"):
        assert float(rows[1, 3][key]) == pytest.approx(measure[key][0][2]), key
    heads = {path.stem: path.read_text().splitlines()[0] for path in tmp_path.glob("*.csv")}
    assert heads["entropy"] == "layer,value,baseline,sd" and heads["dead_experts"] == "layer,value,baseline"


def test_bad_places_are_refused(pair, tmp_path):
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UsageError, match="cannot be written"):
        measuring.write(pair[0], tmp_path / "file/out")
    with pytest.raises(UsageError, match="is no measures.json of format 1"):
        measuring.read(tmp_path / "file")
    with pytest.raises(UsageError, match=r"measures.json: cannot be read \(No such file"):
        measuring.read(tmp_path)


def test_saturation_and_load_over_training():
    last = routers(layers=2, tokens=2000)
    first = routers(layers=2, tokens=2000, seed=5)
    middle = np.where((np.arange(2000) % 2 == 0)[:, None, None], first, last)
    steps = [Planted(scores, name=f"step-{n}", iteration=n, rows=rows)
             for n, scores, rows in ((300, last, 700), (100, first, 2000), (200, middle, 333))]  # fmt: skip
    found = measuring.over_training(steps)
    saturation, by_chance = (np.array(found["saturation"][key]) for key in ("value", "baseline"))
    assert found["saturation"]["coordinates"]["step"] == [100, 200, 300]
    assert saturation[0] == pytest.approx([2 / 16] * 2, abs=0.02) == by_chance[0]
    assert saturation[1] == pytest.approx([(1 + 2 / 16) / 2] * 2, abs=0.02) and saturation[2].tolist() == [1, 1]
    loads = found["load_over_training"]
    alone = measuring.measure(steps[1], OPTIONS)["measures"]
    assert loads["value"][0] == alone["load"]["value"] and loads["gini"][0] == alone["gini"]["value"]
    assert loads["max_violation"][0] == alone["max_violation_global"]["value"] and loads["dead"] == [[0, 0]] * 3


def test_steps_that_do_not_belong_together_are_refused():
    scores = routers(layers=2, tokens=200)
    one, two = (Planted(scores, name=f"step-{n}", iteration=n) for n in (1, 2))
    with pytest.raises(UsageError, match="needs recordings of two steps"):
        measuring.over_training([one])
    with pytest.raises(UsageError, match="iteration 1 is given twice"):
        measuring.over_training([one, one])
    with pytest.raises(UsageError, match="step-3: has experts 8, step-2 16"):
        measuring.over_training([two, Planted(routers(layers=2, tokens=200, experts=8), name="step-3", iteration=0)])
    two.arrays["token_T"] = two.arrays["token_T"].copy()
    two.arrays["token_T"][150] = 77
    with pytest.raises(UsageError, match="step-1: token 150 is another one than in step-2"):
        measuring.over_training([one, two])
