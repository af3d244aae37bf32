"""What is streamed piece by piece, against the functions of all tokens at once."""

import numpy as np
import pytest

from rmoe_megablocks.analysis import measuring
from rmoe_megablocks.analysis.measures import chance, choices, gates, information, load, specialisation
from rmoe_megablocks.analysis.measuring.passes.pieces import pieces
from rmoe_megablocks.analysis.measuring.passes.sampling import Deck, Sample
from rmoe_megablocks.analysis.measuring.passes.survey import survey
from rmoe_megablocks.analysis.measuring.streams.information import bins_of, log_counts, masks_of
from rmoe_megablocks.analysis.measuring.streams.quantiles import Medians
from rmoe_megablocks.errors import UsageError
from tests.analysis.planted import Planted, routers

FEW = measuring.Options(resamples=20, batch_tokens=500)


def value(measured, name, key="value"):
    return np.array(measured["measures"][name][key], dtype=np.float64)


@pytest.fixture(scope="module")
def scores():
    return routers(1.5, layers=3, tokens=5000)


@pytest.fixture(scope="module")
def recording(scores):
    generator = np.random.default_rng(1)
    columns = {name: generator.random((5000, 3)).astype(np.float32) for name in ("margin", "state_norm")}
    columns["margin"][7, 1] = np.nan
    return Planted(scores, domain_T=np.where(np.arange(5000) < 3008, "code", "prose"), rows=777, **columns)


@pytest.fixture(scope="module")
def measured(recording):
    return measuring.measure(recording, FEW)


@pytest.mark.parametrize("experts", [2, 5, 8, 16, 31, 64, 100])
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
def test_information_is_that_of_all_tokens_at_once(experts, scale):
    found = routers(scale, layers=3, tokens=203 if experts < 64 else 47, experts=experts)
    streamed = measuring.measure(Planted(found, rows=90, window=16), FEW)
    assert value(streamed, "mutual_information") == pytest.approx(information.between_layers(found), abs=1e-10)
    shuffled = information.between_shuffled_layers(found, seed=0)
    assert value(streamed, "mutual_information", "baseline") == pytest.approx(shuffled, abs=1e-10)


def test_products_of_counts_do_not_overflow():
    """256 scores in one bin: each of 256 counts of a token is 256, and their product is 2^2048."""
    masks = masks_of(np.ones((256, 1, 40), np.uint8))
    assert log_counts(masks)[0, 0] == pytest.approx(40 * 256 * np.log(256), rel=1e-12)


def test_bins_of_every_half_are_numpys():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[(half >= 0) & (half <= 1)].reshape(-1, 1, 1)
    assert bins_of(half).ravel().tolist() == information.bins(half.ravel().astype(np.float64)).tolist()


def test_gates_are_those_of_all_tokens_at_once(scores, recording, measured):
    full = scores.astype(np.float32)
    for layer in range(3):
        inside = np.median(gates.inside_balance(full[:, layer]))
        assert value(measured, "inside_balance")[layer] == pytest.approx(inside, rel=1e-3)
        outside = np.median(gates.outside_balance(full[:, layer], 2))
        assert value(measured, "outside_balance")[layer] == pytest.approx(outside, rel=1e-3)
        assert value(measured, "entropy")[layer] == pytest.approx(gates.entropy(full[:, layer]).mean(), rel=1e-6)
    for name in ("margin", "state_norm"):
        recorded = recording.arrays[f"{name}_TL"].astype(np.float64)
        assert value(measured, name) == pytest.approx(np.nanmean(recorded, axis=0), rel=1e-6)
        assert value(measured, name, "sd") == pytest.approx(np.nanstd(recorded, axis=0), rel=1e-4)
    assert "1 tokens of a layer have none" in measured["measures"]["margin"]["note"]


def test_loads_and_pairs_are_those_of_all_tokens_at_once(recording, measured):
    chosen = recording.arrays["choices_TLK"].astype(int)
    for layer in range(3):
        counts = load.counts(chosen[:, layer], 16)
        assert value(measured, "load")[layer] == pytest.approx(counts / counts.sum())
        assert value(measured, "max_violation_global")[layer] == pytest.approx(load.max_violation(counts))
        of_batch = load.batch_max_violation(chosen[:, layer], 16, 500)
        assert value(measured, "max_violation_batch")[layer] == pytest.approx(of_batch)
        assert value(measured, "gini")[layer] == pytest.approx(load.gini(counts))
        assert value(measured, "coverage")[layer] == pytest.approx(load.coverage(counts))
        together = choices.together(chosen[:, layer], 16)
        assert value(measured, "coactivation")[layer] == pytest.approx(choices.coactivation(together))
        either = choices.coactivation_of_either(together)
        assert value(measured, "coactivation_of_either")[layer] == pytest.approx(either)
    for layer in range(2):
        plain = choices.transitions(chosen[:, layer], chosen[:, layer + 1], 16)
        assert value(measured, "transitions")[layer] == pytest.approx(plain)
    paths = choices.paths(chosen)
    found = measured["measures"]["paths"]["value"]
    assert (found["number"], found["entropy"]) == (paths.number, pytest.approx(paths.entropy))
    assert sorted(found["shares"]) == pytest.approx(sorted(paths.shares))


def test_specialisation_is_that_of_all_tokens_at_once(recording, measured):
    chosen = recording.arrays["choices_TLK"].astype(int)
    labels = {"input_token": recording.arrays["token_T"], "next_token": recording.arrays["next_token_T"]}
    assert measured["measures"]["vocabulary_specialisation"]["coordinates"]["kind"] == list(labels)
    for row, ids in enumerate(labels.values()):
        for layer in range(3):
            real = ids >= 0
            plain = specialisation.specialisation(chosen[real, layer], ids[real], 16)
            assert value(measured, "vocabulary_specialisation")[row, layer] == pytest.approx(plain.value)
            by_chance = value(measured, "vocabulary_specialisation", "baseline")[row, layer]
            assert by_chance == pytest.approx(plain.chance, abs=0.01)
    names, shares = specialisation.shares(chosen[:, 0], recording.arrays["domain_T"], 16)
    assert names.tolist() == measured["domains"] == ["code", "prose"]
    assert value(measured, "domain_specialisation")[:, 0] == pytest.approx(shares)
    summary = measured["measures"]["domain_specialisation"]["summary"]
    plain = specialisation.specialisation(chosen[:, 0], recording.arrays["domain_T"], 16)
    assert summary["value"][0] == pytest.approx(plain.value)
    assert summary["chance"][0] == pytest.approx(plain.chance, abs=0.02)


def test_figures_do_not_depend_on_where_shards_end(scores):
    found = [measuring.measure(Planted(scores, rows=rows), FEW) for rows in (5000, 321)]
    for name, one in found[0]["measures"].items():
        assert np.array(one["value"] if one["axes"] else one["value"]["shares"]) == pytest.approx(
            np.array(
                found[1]["measures"][name]["value"] if one["axes"] else found[1]["measures"][name]["value"]["shares"]
            )
        ), name
    assert found[0]["bootstrap"]["values"].keys() == found[1]["bootstrap"]["values"].keys()
    for name, one in found[0]["bootstrap"]["values"].items():
        if name != "max_violation_batch":  # belongs to the block in which a batch ends, as its end is one of a piece
            assert one == pytest.approx(found[1]["bootstrap"]["values"][name], abs=2e-7), name


def test_null_experts_are_no_choices():
    """Tokens of one and of two real experts; every measure by hand."""
    chosen = np.array([[[0, -1], [1, 2]], [[1, 0], [-1, -1]], [[0, -1], [1, 2]]] * 100, np.int16)
    recording = Planted(routers(layers=2, tokens=300, experts=3), choices_TLK=chosen, window=10)
    measured = measuring.measure(recording, FEW)
    assert value(measured, "load") == pytest.approx(np.array([[3 / 4, 1 / 4, 0], [0, 1 / 2, 1 / 2]]))
    assert measured["measures"]["dead_experts"]["which"] == [[2], [0]]
    assert value(measured, "coactivation")[0, :2, :2] == pytest.approx(np.array([[1, 1 / 3], [1, 1]]))
    assert measured["measures"]["coactivation"]["value"][0][2] == [None] * 3, "nobody chose it"
    assert value(measured, "coactivation", "baseline")[0, 0, 1] == pytest.approx(2 / (3 * 2) / 3 / (4 / 9))
    assert value(measured, "transitions")[0, 0] == pytest.approx([0, 0.5, 0.5])
    top = measured["measures"]["paths"]["value"]
    assert (top["number"], top["top"]) == (2, [[0, 1], [1, -1]])
    assert measured["measures"]["load"]["note"].startswith("1.33 real experts a token")
    outside = measured["measures"]["outside_balance"]
    assert (
        outside["baseline"] == pytest.approx([4 / 3 / 3, 4 / 3 / 3])
        and "as many real experts" in outside["baseline_is"]
    )


def test_sigmoid_scores_are_taken_over_their_sum():
    scores = np.full((64, 1, 4), 0.5, np.float16)
    measured = measuring.measure(Planted(scores, window=8, score_function="sigmoid"), FEW)
    assert value(measured, "entropy") == pytest.approx(np.log(4))
    assert value(measured, "outside_balance") == pytest.approx(0.5)


def test_scores_beside_null_experts_are_taken_over_their_sum():
    """A softmax over 4 real and 4 null experts: the real ones have half of it."""
    scores = np.full((64, 1, 4), 0.125, np.float16)
    measured = measuring.measure(Planted(scores, window=8, null_experts=4), FEW)
    assert value(measured, "entropy") == pytest.approx(np.log(4))
    assert value(measured, "outside_balance") == pytest.approx(0.5)
    assert "over the real experts" in measured["measures"]["entropy"]["note"]


def test_a_layer_alone_has_no_measures_between_layers():
    measured = measuring.measure(Planted(routers(layers=1, tokens=640)), FEW)
    assert {"transitions", "paths", "predictability"} <= measured["left_out"].keys()
    assert not {"transitions", "paths", "predictability"} & measured["measures"].keys()
    assert "mutual_information" not in measured["figures"]


def test_few_ids_are_kept_where_tables_are_small(scores):
    ids = np.append(np.zeros(4000), np.arange(1, 1001)).astype(np.int32)
    options = measuring.Options(resamples=20, table_bytes=8 * 3 * 16 * 2 * 501)
    found = measuring.measure(Planted(scores, token_T=ids), options)["measures"]["vocabulary_specialisation"]
    assert found["ids"] == [501, 501] and "the 500 rarest ids of 1001 are left out, 10.0%" in found["note"]
    kept = ids <= 500
    chosen = Planted(scores).arrays["choices_TLK"][kept].astype(int)
    expected = [specialisation.specialisation(chosen[:, layer], ids[kept], 16).value for layer in range(3)]
    assert found["value"][0] == pytest.approx(expected)


def test_a_sample_of_tokens_for_the_information_is_told(scores):
    found = measuring.measure(Planted(scores), measuring.Options(resamples=20, information_tokens=1000))
    one = found["measures"]["mutual_information"]
    assert one["tokens"] == 1000 and one["note"].startswith("1000 tokens")
    rows = Sample(5000, 1000, 0).rows
    assert value(found, "mutual_information") == pytest.approx(information.between_layers(scores[rows]), abs=1e-10)


def test_medians():
    values = np.random.default_rng(0).lognormal(size=(1001, 1)).astype(np.float32)
    medians = Medians(1, 1, (-24, 26))
    for part in np.array_split(values, 7):
        medians.add(part, 0)
    assert medians.median(np.ones((1, 1)))[0, 0] == pytest.approx(np.median(values), rel=1e-3)
    constant = Medians(2, 1, (0, 26))
    constant.add(np.full((10, 1), 1.0, np.float32), 0)
    constant.add(np.full((8, 1), 3.3, np.float32), 1)
    weights = np.array([[1, 1], [1, 2], [4, 5]])
    assert constant.median(weights)[:, 0] == pytest.approx([1.0, 3.3, (1 + np.float32(3.3)) / 2])


def test_a_deck_is_one_permutation_of_which_all_are_alike_likely():
    counts = np.array([3, 0, 2, 1])
    places = np.zeros((6, 4))
    for seed in range(3000):
        deck = Deck(counts, seed)
        dealt = np.concatenate([deck.deal(size) for size in (1, 3, 2)])
        assert np.bincount(dealt, minlength=4).tolist() == counts.tolist()
        places[np.arange(6), dealt] += 1
    assert places / 3000 == pytest.approx(np.tile(counts / 6, (6, 1)), abs=0.04)


def test_uniform_loads_of_both_ways_have_the_same_spread():
    sizes = np.array([0, 100, 700])  # (100 + 1400) / 16 = 94 choices an expert: token by token
    told = [chance.uniform_loads(sizes * by, 16, draws=400, seed=1) for by in (1, 2)]  # Gaussian from 100 on
    for by, one in zip((1, 2), told, strict=True):
        assert one.sum(1) == pytest.approx(np.full(400, 1500 * by))
        share = np.arange(3) / 16
        assert one.std() == pytest.approx(np.sqrt((sizes * by * share * (1 - share)).sum()), rel=0.03)


def test_blocks_are_whole_windows_of_every_domain():
    recording = Planted(routers(tokens=3200), domain_T=np.repeat(["a", "b", "c"], [640, 64 * 30, 640]), window=64)
    found = survey(recording, FEW)
    assert found.blocks == 10 and found.tokens == 3200
    seen = {block: set() for block in range(10)}
    for piece in pieces(recording, found, FEW):
        seen[piece.block] |= {found.domains[code] for code in piece.domain_T}
    assert all(names == {"a", "b", "c"} for names in seen.values())


def test_bad_recordings_are_refused_in_one_line():
    def refusal(recording):
        with pytest.raises(UsageError) as told:
            measuring.measure(recording, FEW)
        assert "\n" not in str(told.value)
        return str(told.value)

    scores = routers(tokens=128)
    broken = Planted(scores)
    broken.arrays["scores_TLE"][70, 2, 5] = np.nan
    assert refusal(broken).startswith("planted: token 70, layer 3: the score of expert 5 is nan")
    broken = Planted(scores)
    broken.arrays["choices_TLK"][9, 1, 0] = 16
    assert refusal(broken).startswith("planted: token 9, layer 2: chose [16, ")
    broken = Planted(scores)
    broken.about.tokens = 129
    assert "has 128 tokens and says 129" in refusal(broken)
    assert "has no token" in refusal(Planted(scores[:0]))
    assert "one expert" in refusal(Planted(np.ones((64, 2, 1)), 1))
    with pytest.raises(UsageError, match="batch tokens 0: must be at least 1"):
        measuring.Options(batch_tokens=0)
