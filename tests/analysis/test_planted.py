"""What is planted in a recording is found by ``measure``, and what is not there is not."""

import numpy as np
import pytest

from rmoe_megablocks.analysis import measuring
from rmoe_megablocks.analysis.measures import weights
from tests.analysis.planted import Planted, best_first, routers

OPTIONS = measuring.Options(resamples=50, batch_tokens=512)
T, L, E, K = 6400, 4, 16, 2


def measure(scores, **more):
    return measuring.measure(Planted(scores, K, **more), OPTIONS)["measures"]


def array(measure, key="value"):
    return np.array(measure[key], dtype=np.float64)


def test_independent_routers_have_the_information_of_shuffled_ones_at_every_flatness():
    """The value itself runs over a curve with a maximum far above 0; what is above the baseline is nothing."""
    curve, left = [], []
    for scale in (0.1, 0.5, 1.0, 2.0, 8.0):
        found = measure(routers(scale, layers=2))["mutual_information"]
        curve.append(array(found)[0, 1])
        left.append(curve[-1] - array(found, "baseline")[0, 1])
    assert curve == sorted(curve[:3]) + sorted(curve[3:], reverse=True)
    assert max(curve) > 1.4 and min(curve) < 0.1
    assert np.abs(left).max() < 0.02


def test_a_copied_router_has_the_entropy_and_a_half_copied_one_lies_between():
    scores = routers(layers=3)
    scores[:, 1] = scores[:, 0]
    half = np.random.default_rng(1).random(len(scores)) < 0.5
    scores[half, 2] = scores[half, 0]
    found = measure(scores)["mutual_information"]
    value, by_chance = array(found), array(found, "baseline")
    assert value[0, 1] == pytest.approx(value[0, 0], abs=1e-12)
    assert value[0, 2] == pytest.approx((value[0, 0] + by_chance[0, 2]) / 2, abs=0.02)
    assert by_chance[0, 1] < 0.8 * value[0, 1]


def test_uniform_loads_have_no_violation():
    chosen = (np.arange(T)[:, None, None] * K + np.arange(K) + np.arange(L)[:, None]) % E
    found = measure(routers(tokens=T), choices_TLK=chosen.astype(np.int16))
    for name in ("max_violation_global", "max_violation_batch", "gini", "dead_experts"):
        assert found[name]["value"] == [0.0] * L, name
        assert name == "dead_experts" or found[name]["baseline"] > 0, "a random router has not even loads"
    assert array(found["coverage"]) == pytest.approx(array(found["coverage"], "baseline"))


def test_a_planted_dead_expert_is_found():
    scores = routers(tokens=T)
    scores[:, 2, 5] = 0
    found = measure(scores)
    assert found["dead_experts"]["value"] == [0, 0, 1, 0] and found["dead_experts"]["which"] == [[], [], [5], []]
    assert found["load"]["value"][2][5] == 0 and found["coactivation"]["value"][2][5] == [None] * E


def test_planted_domain_experts_are_found():
    """Domains of many windows each; expert 3 of layer 2 has a choice of every token of the first."""
    domain = np.where(np.arange(T) // 640 % 2 == 0, "code", "prose")
    chosen = best_first(routers(tokens=T), K)
    plain = measure(routers(tokens=T), domain_T=domain)["domain_specialisation"]["summary"]
    assert np.abs(array(plain) - array(plain, "chance")).max() < 0.02
    assert np.abs(array(plain, "information") - array(plain, "information_chance")).max() < 0.002
    code = domain == "code"
    chosen[code, 1, 0] = 3
    chosen[code, 1, 1] = np.where(chosen[code, 1, 1] == 3, 4, chosen[code, 1, 1])
    found = measure(routers(tokens=T), domain_T=domain, choices_TLK=chosen)["domain_specialisation"]
    assert found["coordinates"]["domain"] == ["code", "prose"]
    value, blind = array(found), array(found, "baseline")
    assert value[0, 1, 3] == 0.5 and blind[0, 1, 3] == pytest.approx(0.28, abs=0.02)
    assert np.unravel_index(np.argmax(value - blind), value.shape) == (0, 1, 3)
    above = array(found["summary"], "information") - array(found["summary"], "information_chance")
    assert np.argmax(above) == 1 and above[1] > 0.05 and np.delete(np.abs(above), 1).max() < 0.002


def test_a_planted_token_expert_is_found():
    ids = np.random.default_rng(2).integers(0, 40, T).astype(np.int32)
    chosen = best_first(routers(tokens=T), K)
    chosen[:, 0] = np.stack([ids % 16, (ids + 1) % 16], axis=1)
    found = measure(routers(tokens=T), token_T=ids, choices_TLK=chosen)["vocabulary_specialisation"]
    assert found["coordinates"]["kind"] == ["input_token", "next_token"]
    value, by_chance = array(found), array(found, "baseline")
    assert value[0, 0] == 1 and by_chance[0, 0] < 0.25
    assert value[:, 1:] == pytest.approx(by_chance[:, 1:], abs=0.02)
    assert value[1] == pytest.approx(by_chance[1], abs=0.02), "the next token is drawn, and has no expert"


def test_planted_paths_and_bound_layers_are_found():
    chosen = best_first(routers(tokens=T), K)
    chosen[: T // 4, :, 0] = [3, 1, 4, 1]
    found = measure(routers(tokens=T), choices_TLK=chosen)["paths"]
    assert found["value"]["top"][0] == [3, 1, 4, 1]
    assert found["value"]["shares"][0] == pytest.approx(0.25, abs=0.001)
    assert found["value"]["entropy"] < found["baseline"]["entropy"] - 0.5
    bound = best_first(routers(tokens=T), K)
    bound[:, 1] = (bound[:, 0] + 1) % E
    measured = measure(routers(tokens=T), choices_TLK=bound)
    value, by_chance = array(measured["predictability"]), array(measured["predictability"], "baseline")
    # the best expert is known, so one of two choices; the other is one of 15 as likely ones, of which one is guessed
    assert value[0] == pytest.approx((1 + 1 / 15) / 2, abs=0.02) and by_chance[0] < 0.15
    assert value[1:] == pytest.approx(by_chance[1:], abs=0.02)
    information = array(measured["transitions"], "information")
    assert information[0] > 0.3
    assert information[1:] == pytest.approx(array(measured["transitions"], "information_baseline")[1:], abs=0.002)


def test_similarity_of_independent_experts_is_the_papers_figure():
    generator = np.random.default_rng(0)
    w1, w3, w2 = (
        generator.standard_normal(shape, np.float32) for shape in ((16, 448, 1280), (16, 448, 1280), (16, 1280, 448))
    )
    similarity = weights.expert_similarity(w1, w3, w2)[None]
    rows = weights.row_similarity(generator.standard_normal((16, 1280)))[None]
    kept = {"expert_similarity_LEE": similarity, "router_similarity_LEE": rows}
    found = measure(routers(layers=1, tokens=640), weights=kept)
    assert found["expert_similarity"]["value"] == pytest.approx([0.1875], abs=0.01)
    assert found["expert_similarity"]["baseline"] == [0.1875]
    assert found["expert_similarity"]["without_diagonal"] == pytest.approx([0], abs=0.005)
    assert found["router_similarity"]["value"] == pytest.approx([0], abs=0.01)


def test_recorded_gates_are_told_by_layer():
    columns = {name: np.tile(np.arange(L, dtype=np.float32) + place, (T, 1)) for place, name in
               enumerate(("margin", "state_norm", "update_gate", "reset_gate"))}  # fmt: skip
    measured = measuring.measure(Planted(routers(tokens=T), K, **columns), OPTIONS)
    for place, name in enumerate(columns):
        assert measured["measures"][name]["value"] == pytest.approx([place, place + 1, place + 2, place + 3])
        assert measured["figures"][name]["value"] == pytest.approx(place + 1.5)
    assert not {"margin", "state_norm"} & measured["left_out"].keys()
