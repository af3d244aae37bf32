"""metrics.jsonl over sessions: no iteration twice, none lost, nothing that JSON cannot say."""

import json

import pytest

from rmoe_megablocks.megatron.monitoring.metrics import Metrics


def iteration(number: int, tokens: int = 100, seconds: float = 1.0, **more) -> dict:
    return {"iteration": number, "lm_loss": 2.0, "tokens": tokens, "seconds": seconds} | more


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "metrics.jsonl")


def lines(metrics: Metrics) -> list[dict]:
    return [json.loads(line) for line in metrics.path.read_text().splitlines()]


def test_totals_are_those_of_all_sessions_and_of_each_iteration_once(metrics):
    metrics.resume(1)
    for number in (1, 2, 3, 4):
        metrics.add("train", iteration(number, tokens=100 * number))
        metrics.add("valid", {"iteration": number, "tokens": 7, "seconds": 9.0})
    metrics.path.write_text(metrics.path.read_text() + '{"kind": "train", "iterat')  # killed while it wrote
    again = Metrics(metrics.path)
    again.resume(3)  # the checkpoint is of iteration 2
    assert again.trained_tokens == 300
    assert [(line["kind"], line["iteration"]) for line in lines(again)] == [
        ("train", 1),
        ("valid", 1),
        ("train", 2),
        ("valid", 2),
    ]
    again.add("train", iteration(3, tokens=1, seconds=0.5))
    assert again.trained_tokens == 301
    assert again.totals(3) == {"seconds": 2.5, "tokens": 301}


def test_an_older_checkpoint_has_the_totals_of_its_own_iterations(metrics):
    for number in (1, 2, 3):
        metrics.add("train", iteration(number))
    assert metrics.totals(2) == {"seconds": 2.0, "tokens": 200}
    assert metrics.totals(0) == {"seconds": 0, "tokens": 0}


def test_lines_from_before_there_were_kinds_count(metrics):
    metrics.path.write_text(json.dumps(iteration(1)) + "\n" + json.dumps({"iteration": 2, "stopped": "nan"}) + "\n")
    assert metrics.totals(2) == {"seconds": 1.0, "tokens": 100}


def test_what_is_not_finite_is_null_and_named(metrics):
    metrics.add("train", iteration(1, grad_norm=float("inf"), routing={"entropy": [1.0, float("nan")]}))
    (line,) = (json.loads(text, parse_constant=pytest.fail) for text in metrics.path.read_text().splitlines())
    assert line["grad_norm"] is None and line["routing"] == {"entropy": [1.0, None]}
    assert line["not_finite"] == ["grad_norm", "routing"]
    metrics.add("train", iteration(2))
    assert "not_finite" not in lines(metrics)[1]


@pytest.mark.parametrize(("iterations", "stays"), [(2, True), (3, False)])
def test_a_summary_of_iterations_that_are_done_again_goes(metrics, iterations, stays):
    summary = metrics.path.with_name("summary.json")
    summary.write_text(json.dumps({"iterations": iterations}))
    metrics.resume(3)
    assert summary.exists() == stays
