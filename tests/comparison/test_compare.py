"""``rmoe compare`` on made-up runs, against figures computed by hand."""

import json
import statistics

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.comparison import groups, runs
from rmoe_megablocks.comparison.statistics import paired
from tests.comparison import made_up

pytest.importorskip("seaborn", reason="pip install 'rmoe-megablocks[compare]'")
pandas = pytest.importorskip("pandas")
pytest.importorskip("scipy")
pytest.importorskip("tabulate")

GRU, LINEAR, MLP = (3.1, 3.2, 3.3), (3.2, 3.3, 3.1), (3.1, 3.1, 2.8)  # mlp - linear: -.1, -.2, -.3


@pytest.fixture
def folder(tmp_path):
    for router, tests in (("gru", GRU), ("linear", LINEAR), ("mlp", MLP)):
        for seed, test in enumerate(tests, 1):
            made_up.write(tmp_path / "runs", router, seed, test, seconds={"gru": 1.5}.get(router, 1.0))
    return tmp_path / "runs"


def compare(*argv) -> int:
    return cli.main(["compare", *map(str, argv)])


def test_statistics_are_those_computed_by_hand(folder, tmp_path, capsys):
    assert compare(folder, "--by", "router", "--out", tmp_path / "out") == 0
    found = pandas.read_csv(tmp_path / "out" / "comparison.csv").set_index("group")
    assert list(found.index) == ["linear", "gru", "mlp"]
    assert found.test_bpc["gru"] == pytest.approx(3.2) and found.test_bpc_sd["gru"] == pytest.approx(0.1)
    assert found.test_bpc_difference["gru"] == pytest.approx(0)
    assert found.test_bpc_low["gru"] == pytest.approx(-0.1) and found.test_bpc_high["gru"] == pytest.approx(0.2)
    assert found.test_bpc_difference["mlp"] == pytest.approx(-0.2) and found.test_bpc_pairs["mlp"] == 3
    assert found.test_bpc_low["mlp"] == pytest.approx(-0.3) and found.test_bpc_high["mlp"] == pytest.approx(-0.1)
    assert list(found.test_bpc_verdict) == ["baseline", "not distinguishable", "lower"]
    assert found.valid_bpc["mlp"] == pytest.approx(2.9)
    assert found.time_ratio["gru"] == pytest.approx(1.5) and found.memory_ratio["gru"] == 1
    assert found.tokens["gru"] == made_up.ITERATIONS * made_up.TOKENS
    assert found.router["gru"] - 4 * (64 * 128 + 8 * 64) == 6 * 64 * 64 + 6 * 64
    assert found.training_flops["gru"] == found.flops_per_token["gru"] * found.tokens["gru"]
    told = capsys.readouterr().out
    assert "| +0.0000 [-0.1000, +0.2000] | not distinguishable |" in told
    assert max(map(len, told.splitlines())) <= 100
    assert "Warning" not in told, "the routers' own arguments belong to what is compared"
    of_runs = pandas.read_csv(tmp_path / "out" / "runs.csv")
    assert list(of_runs[of_runs.group == "gru"].test_bpc) == list(GRU)


def test_the_interval_of_two_pairs_is_their_range():
    assert paired({1: 1.0, 2: 4.0, 9: 7.0}, {2: 3.0, 1: 3.0}) == (-0.5, (-2.0, 1.0), 2)
    assert paired({1: 1.0}, {1: 3.0}) == (-2.0, None, 1) and paired({1: 1.0}, {2: 3.0}) is None
    assert paired({1: 1.0, 2: 2.0}, {1: 0.5, 2: 1.5}).verdict == "higher"


def test_the_interval_covers_as_often_as_theory_says():
    """20 pairs of a normal difference: the percentile bootstrap's 95 % are about 93 %."""
    import numpy

    draws = numpy.random.default_rng(1).normal(0.3, 1, (200, 20))
    found = [paired(dict(enumerate(row)), dict.fromkeys(range(20), 0.0)).interval for row in draws]
    covered = statistics.fmean(low <= 0.3 <= high for low, high in found)
    assert 0.88 <= covered <= 0.98


def test_curves_are_means_over_seeds_in_common_places(folder):
    from rmoe_megablocks.comparison import figures

    of_label = groups.grouped(runs.find_runs([str(folder)]), ["moe_router_type"])
    found = figures.curves(of_label, "hours")
    train, valid = (found[kind][found[kind].group == "gru"] for kind in ("train", "valid"))
    assert list(valid.groupby("x").loss.mean()) == pytest.approx([4 - 1 + 3.2, 4 - 2 + 3.2])
    assert list(valid.groupby("x").loss.std()) == pytest.approx([0.1, 0.1])
    assert sorted(set(valid.x)) == pytest.approx([10 * 1.5 / 3600, 20 * 1.5 / 3600])
    assert len(train) == 3 * made_up.ITERATIONS


def test_figures_are_written(folder, tmp_path):
    assert compare(folder, "--by", "router", "--x", "tokens", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    svg = (tmp_path / "out" / "curves.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        ({"lr": 1e-3}, "also differ in --lr: linear: 0.002; gru: 0.001"),
        ({"global_batch_size": 32}, "also differ in --global-batch-size: linear: 16; gru: 32"),
    ],
)
def test_a_confound_is_told(tmp_path, capsys, changed, warning):
    for seed in (1, 2):
        made_up.write(tmp_path, "linear", seed, 3.2)
        made_up.write(tmp_path, "gru", seed, 3.1, **changed)
    assert compare(tmp_path, "--by", "router") == 0
    assert warning in " ".join(capsys.readouterr().out.split())


def test_other_text_lengths_and_seeds_are_told(tmp_path, capsys):
    made_up.write(tmp_path, "linear", 1, 3.2)
    made_up.write(tmp_path, "linear", 2, 3.2)
    other = made_up.write(tmp_path, "gru", 1, 3.1, train_data_path=["elsewhere/train"])
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"iterations": 10}))
    assert compare(tmp_path, "--by", "router") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "differ in their training text: linear: mock data; gru: elsewhere/train" in told
    assert "differ in their iterations done: linear: 20; gru: 10" in told
    assert "one seed only: gru." in told and "linear: 1, 2; gru: 1" in told
    assert "| -0.1000 | one pair: no interval |" in " ".join(told.split())


def test_without_by_everything_that_differs_makes_groups(tmp_path, capsys):
    for seed in (1, 2):
        for lr in (1e-3, 2e-3):
            made_up.write(tmp_path, "gru", seed, 3.0 + lr, lr=lr)
    assert compare(tmp_path, "--baseline", "lr 0.002") == 0
    assert "| lr 0.001 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["{folder}", "--by", "lrr"], "--by lrr: no run has such an argument"),
        (["{folder}", "--by", "router", "--baseline", "rnn"], "--baseline rnn: the groups are gru; linear; mlp"),
        (["{folder}/gru-seed1/config.yaml"], "no run in it"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, argv, told):
    assert compare(*(word.format(folder=folder) for word in argv)) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("summary.json", None, "has no summary.json: not a finished run"),
        ("metrics.jsonl", "{broken", "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", "", "no training iteration"),
        ("summary.json", '{"iterations": 20}', "neither test_bpc nor valid_bpc"),
        ("arguments.json", "{}", "arguments.json: has no seed"),
        ("arguments.json", "[1]", "arguments.json: is no record of a run"),
    ],
)
def test_a_damaged_run_is_one_line(folder, capsys, file, text, told):
    place = folder / "gru-seed1" / file
    place.unlink() if text is None else place.write_text(text)
    assert compare(folder) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_two_runs_of_one_seed_are_refused(folder, capsys):
    made_up.write(folder, "gru", 1, 3.0, lr=1e-4)
    assert compare(folder, "--by", "router") == 2
    assert "both are gru, seed 1; they differ in --lr: add it to --by" in capsys.readouterr().err
