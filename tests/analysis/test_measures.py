"""Measures against closed forms, simulations with a known answer, and plain definitions."""

import math
from collections import Counter

import numpy as np
import pytest

from rmoe_megablocks.analysis.measures import (
    chance,
    choices,
    gates,
    information,
    load,
    specialisation,
    weights,
)

T, E, K = 4000, 16, 2


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def routers(scale, layers=2, tokens=T, experts=E, seed=0):
    return softmax(scale * np.random.default_rng(seed).standard_normal((tokens, layers, experts)))


def plain_information(a, b):
    """The definition, a token at a time: what sklearn.metrics.mutual_info_score of the bins gives."""
    edges, found = np.linspace(0, 1, 100), []
    for x, y in zip(np.digitize(a, edges), np.digitize(b, edges), strict=True):
        n, p, q, both = len(x), Counter(x), Counter(y), Counter(zip(x, y, strict=True))
        found.append(sum(c / n * math.log(c * n / (p[i] * q[j])) for (i, j), c in both.items()))
    return np.mean(found)


@pytest.mark.parametrize("experts", [8, 16, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_information_is_the_papers(scale, experts):
    scores = routers(scale, tokens=50, experts=experts)
    found = information.between_layers(scores)
    assert found[0, 1] == pytest.approx(plain_information(scores[:, 0], scores[:, 1]), abs=1e-12)
    assert found[0, 0] == pytest.approx(plain_information(scores[:, 0], scores[:, 0]), abs=1e-12)
    assert found[1, 0] == found[0, 1]


def test_information_of_independent_routers_depends_on_how_flat_they_are_and_the_baseline_removes_it():
    curve, left = [], []
    for scale in (0.1, 0.5, 1.0, 2.0, 8.0):
        scores = routers(scale)
        curve.append(information.between_layers(scores)[0, 1])
        left.append(curve[-1] - information.between_shuffled_layers(scores)[0, 1])
    assert max(curve) > 0.5 and min(curve) < 0.1
    assert np.abs(left).max() < 0.02


def test_information_of_a_copied_and_a_half_copied_router():
    scores = routers(1.0, layers=3)
    scores[:, 1] = scores[:, 0]
    half = np.random.default_rng(1).random(T) < 0.5
    scores[half, 2] = scores[half, 0]
    found, by_chance = information.between_layers(scores), information.between_shuffled_layers(scores)
    assert found[0, 1] == pytest.approx(found[0, 0], abs=1e-12), "a copy has the entropy"
    assert found[0, 2] == pytest.approx((found[0, 0] + by_chance[0, 2]) / 2, abs=0.02)
    assert by_chance[0, 1] < 0.8 * found[0, 1]


def test_gates():
    flat, sharp = np.full((1, E), 1 / E), np.eye(E)[:1] * 0.9 + 0.1 / E
    assert gates.inside_balance(flat) == pytest.approx(1) and gates.outside_balance(flat, K) == pytest.approx(K / E)
    assert gates.inside_balance(sharp) == pytest.approx((0.9 + 0.1 / E) / (0.1 / E))
    assert gates.outside_balance(sharp, K) == pytest.approx(0.9 + 0.2 / E)
    assert gates.entropy(flat) == pytest.approx(math.log(E)) and gates.entropy(np.eye(E)) == pytest.approx(np.zeros(E))
    logits = np.array([[3.0, 1.0, 0.5, -2.0]])
    assert gates.margin(logits, 2) == pytest.approx(0.5)
    assert gates.margin(np.log(softmax(logits)), 1) == pytest.approx(2.0)


def test_load():
    uniform = np.arange(E * K * 10).reshape(-1, K) % E
    counts = load.counts(uniform, E)
    assert load.max_violation(counts) == 0 and load.gini(counts) == 0 and not len(load.dead(counts))
    assert load.coverage(counts) == pytest.approx(np.arange(1, E + 1) / E)
    one = load.counts(np.zeros((10, 1), int), E)
    assert load.max_violation(one) == E - 1 and load.gini(one) == pytest.approx((E - 1) / E)
    assert list(load.dead(one)) == list(range(1, E))
    assert list(load.counts(np.array([[0, E], [-1, 3]]), E)[[0, 3]]) == [1, 1], "null experts are none"


def test_load_of_a_batch_is_larger_by_chance():
    chosen = chance.uniform_choices(T, E, K)
    overall = load.max_violation(load.counts(chosen, E))
    batch = load.batch_max_violation(chosen, E, 100)
    assert overall < 0.15 < batch < 2 * math.sqrt(2 * math.log(E) / (100 * K / E))
    with pytest.raises(ValueError, match="less than one batch"):
        load.batch_max_violation(chosen[:50], E, 100)


def test_a_planted_dead_expert_is_found():
    chosen = chance.uniform_choices(T, E, K)
    assert list(load.dead(load.counts(np.where(chosen == 5, 6, chosen), E))) == [5]


def test_saturation():
    first, last = (chance.uniform_choices(T, E, K, seed) for seed in (0, 1))
    assert choices.saturation(first, first[:, ::-1]) == 1
    assert choices.saturation(first, last) == pytest.approx(K / E, abs=0.01)


def test_coactivation_counts_all_pairs():
    counts = choices.together(np.array([[0, 1, 2], [2, 0, 3]]), 4)
    assert counts.tolist() == [[2, 1, 2, 1], [1, 1, 1, 0], [2, 1, 2, 1], [1, 0, 1, 1]]
    assert choices.coactivation(counts)[0].tolist() == [1, 0.5, 1, 0.5]
    assert choices.coactivation(counts)[1].tolist() == [1, 1, 1, 0]
    assert choices.coactivation_of_either(counts)[0].tolist() == [1, 0.5, 1, 0.5]
    by_chance = choices.coactivation(choices.together(chance.uniform_choices(T, E, 4), E))
    assert by_chance[~np.eye(E, dtype=bool)].mean() == pytest.approx(3 / 15, abs=0.01)


def test_transitions_of_independent_and_of_bound_layers():
    first, second = (chance.uniform_choices(T, E, K, seed) for seed in (0, 1))
    found = choices.transitions(first, second, E)
    assert found.sum(1) == pytest.approx(np.ones(E)) and np.abs(found - 1 / E).max() < 0.04
    assert choices.transitions(first[:, :1], (first[:, :1] + 1) % E, E).tolist() == np.roll(np.eye(E), 1, 1).tolist()
    assert np.isnan(choices.transitions(np.zeros((3, 1), int), np.zeros((3, 1), int), 2)[1]).all()


def test_a_planted_path_is_found():
    chosen = np.stack([chance.uniform_choices(T, E, K, seed) for seed in range(4)], axis=1)
    chosen[:1000, :, 0] = [3, 1, 4, 1]
    found = choices.paths(chosen)
    assert found.top[0].tolist() == [3, 1, 4, 1] and found.shares[0] == pytest.approx(0.25, abs=0.001)
    assert found.number == len(np.unique(chosen[:, :, 0], axis=0))
    few = choices.paths(np.stack([chance.uniform_choices(200_000, 4, 1, seed) for seed in range(2)], axis=1))
    assert few.number == 16 and few.entropy == pytest.approx(2 * math.log(4), abs=1e-3)


def test_predictions():
    logits = np.random.default_rng(0).standard_normal((T, E))
    chosen = np.argsort(-logits, axis=1)[:, :K]
    assert choices.predicted(logits, chosen) == 1
    assert choices.predicted(chance.shuffled(logits), chosen) == pytest.approx(K / E, abs=0.01)


def test_similarity_of_independent_experts_is_the_papers_figure():
    generator = np.random.default_rng(0)
    w1, w3, w2 = (generator.standard_normal(shape) for shape in ((16, 448, 1280), (16, 448, 1280), (16, 1280, 448)))
    found = weights.expert_similarity(w1, w3, w2)
    assert weights.paper_mean(found) == pytest.approx(0.1875, abs=0.01)
    assert weights.mean_of_others(found) == pytest.approx(0, abs=0.005) and np.diag(found) == pytest.approx(np.ones(16))
    same = weights.expert_similarity(*(np.repeat(w[:1], 4, axis=0) for w in (w1, w3, w2)))
    assert weights.mean_of_others(same) == pytest.approx(1) and weights.paper_mean(same) == pytest.approx(3)


def test_similarity_of_rows():
    rows = np.random.default_rng(0).standard_normal((E, 4000))
    assert np.abs(weights.row_similarity(rows) - np.eye(E)).max() < 0.08
    assert weights.alignment(rows, -2 * rows) == pytest.approx(-np.ones(E))


def test_planted_domain_experts_are_found():
    labels = np.arange(T) % 4
    chosen = 4 + chance.uniform_choices(T, E - 4, K)
    plain = specialisation.specialisation(chosen, labels, E)
    assert plain.value == pytest.approx(plain.chance, abs=0.02)
    chosen[:, 0] = labels
    names, rows = specialisation.shares(chosen, labels, E)
    assert names.tolist() == [0, 1, 2, 3] and rows[:, :4].tolist() == (np.eye(4) / 2).tolist()
    found = specialisation.specialisation(chosen, labels, E)
    assert found.value == pytest.approx(0.5 + 0.5 / 12, abs=0.02) and found.chance == pytest.approx(0.25, abs=0.03)


def test_rare_tokens_look_specialised_by_chance():
    """Why a baseline stands beside it: 2 tokens a label can have 4 of 16 experts at most."""
    chosen = chance.uniform_choices(T, E, K)
    found = specialisation.specialisation(chosen, np.arange(T) // 2, E)
    assert found.value > 3 * K / E and found.value == pytest.approx(found.chance, abs=0.02)
