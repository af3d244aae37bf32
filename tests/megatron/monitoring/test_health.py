"""Figures of the routing from logits that are known."""

import argparse
import math
import re

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from rmoe_megablocks.megatron.monitoring import reporting, summary
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from tests.distributed.arguments import of_type
from tests.megatron.monitoring.test_reporting import args, batches, lines, train  # noqa: F401  fixtures
from tests.megatron.recurrence.test_model import build, forward


def router(layer_number: int, training: bool = True) -> TopKRouter:
    """As far as the figures ask for one."""
    made = TopKRouter.__new__(TopKRouter)
    torch.nn.Module.__init__(made)
    made.layer_number, made.is_mtp_layer, made.training = layer_number, False, training
    return made


def observed(*logits_LTE: torch.Tensor) -> dict[str, list[float]]:
    health = RoutingHealth(len(logits_LTE), 0, logits_LTE[0].shape[-1])
    for layer, logits_TE in enumerate(logits_LTE, 1):
        chosen = torch.nn.functional.one_hot(logits_TE.argmax(-1), logits_TE.shape[-1]).bool()
        health._observe(router(layer), logits_TE, chosen.reshape(-1, logits_TE.shape[-1]))
    return health.report()


def test_the_logits_spread_is_the_root_of_the_tokens_mean_variance(one_process):
    """Variances around each token's own mean over the 4 experts: 5/4 and 0; then flat; then 1 shifted by 1e3."""
    first = torch.tensor([[0.0, 1.0, 2.0, 3.0], [7.0, 7.0, 7.0, 7.0]])
    flat = torch.full((3, 4), -2.0)
    shifted = torch.tensor([[[1001.0, 999.0, 1001.0, 999.0]]])
    health = observed(first, flat, shifted)
    assert health["logits_std"] == pytest.approx([math.sqrt((5 / 4 + 0) / 2), 0, 1], abs=1e-6)
    assert health["router_entropy"][1] == pytest.approx(math.log(4))
    assert "state_norm" not in health


def test_small_logits_cost_the_entropy_half_their_variance(one_process):
    torch.manual_seed(0)
    health = observed(0.05 * torch.randn(20000, 8))
    (spread,), (entropy,) = health["logits_std"], health["router_entropy"]
    assert spread == pytest.approx(0.05 * math.sqrt(7 / 8), rel=0.02)
    assert math.log(8) - entropy == pytest.approx(spread**2 / 2, rel=0.02)


def test_micro_batches_count_by_their_tokens_and_a_report_starts_afresh(one_process):
    health = RoutingHealth(1, 0, 2)
    chosen = torch.tensor([[True, False]])
    for values in ([[2.0, 0.0]], [[4.0, 0.0]] * 3):  # variances 1 and 4
        logits = torch.tensor(values)
        health._observe(router(1), logits, chosen.expand(len(logits), 2))
    assert health.report()["logits_std"] == pytest.approx([math.sqrt((1 + 3 * 4) / 4)])
    health._observe(router(1, training=False), torch.tensor([[9.0, 0.0]]), chosen)
    assert health.report()["logits_std"] == []


@pytest.mark.parametrize("kind", ["gru", "linear"])
def test_every_router_type_in_a_model(one_process, kind):
    model = build(*of_type(kind))
    health, seen = RoutingHealth(4, 0, 4), []
    health.watch([model])
    for module in model.modules():
        if isinstance(module, TopKRouter):
            routing = module.routing
            module.routing = lambda logits, *a, routing=routing, **k: (seen.append(logits), routing(logits, *a, **k))[1]
    forward(model, 1)
    expected = [logits.reshape(-1, 4).double().var(-1, correction=0).mean().sqrt().item() for logits in seen]
    report = health.report()
    assert report["logits_std"] == pytest.approx(expected, rel=1e-4) and len(expected) == 4
    assert ("state_norm" in report) == (kind == "gru")


def figures(*spreads: float) -> dict[str, list[float]]:
    return {
        "load_balancing_loss": [1.0] * len(spreads),
        "busiest_expert_share": [0.125] * len(spreads),
        "router_entropy": [2.0794] * len(spreads),
        "logits_std": list(spreads),
    }


class Known:
    """A RoutingHealth that reports what it is told to; ``asked`` counts."""

    num_logits = 8

    def __init__(self, *spreads: float) -> None:
        self.spreads, self.asked = spreads, 0

    def report(self) -> dict[str, list[float]]:
        self.asked += 1
        return figures(*self.spreads)


def test_the_first_iteration_is_measured_written_and_told(args, batches, tmp_path, capfd):  # noqa: F811
    health = Known(0.00931, 0.0101)
    reporter = reporting.Reporter(tmp_path, {}, health)
    reporter.start()
    measured = []
    for iteration in (1, 2, 3, 4):
        args.curr_iteration = iteration - 1
        measured.append(health.measuring())
        train(reporter, iteration, samples_before=4 * iteration)
    assert measured == [True, True, False, True] and health.asked == 3  # log_interval is 2
    assert [record["iteration"] for record in lines(reporter) if "routing" in record] == [1, 2, 4]
    assert lines(reporter)[0]["routing"]["logits_std"] == [0.00931, 0.0101]
    assert args.scalars["routing/logits_std/layer_1", 1] == 0.0101
    told = capfd.readouterr().err
    assert told.count("at the start") == 1
    assert told.startswith("at the start | logits' std 0.0093 0.01 | entropy 2.079 of 2.079\n")
    assert re.search(r"iteration +2/4 .* balance 1.000 \| entropy 2.08 \| logits 0.0097 \| busiest 0.12 0.12\n", told)


class KnownNull(Known):
    def report(self) -> dict[str, list[float]]:
        return super().report() | {"real_experts_per_token": [0.5, 1.5]}


def test_with_null_experts_the_real_ones_of_a_token_are_told(args, batches, tmp_path, capfd):  # noqa: F811
    reporter = reporting.Reporter(tmp_path, {}, KnownNull(0.01, 0.01))
    run = argparse.Namespace(moe_null_experts=3)
    assert summary._null_experts(run, reporter) == {"moe_null_experts": 3, "real_experts_per_token": None}
    train(reporter, 2, samples_before=4)
    assert lines(reporter)[0]["routing"]["real_experts_per_token"] == [0.5, 1.5]
    assert args.scalars["routing/real_experts_per_token/layer_1", 2] == 1.5
    assert "| balance 1.000 | experts 1.00 | entropy 2.08" in capfd.readouterr().err
    assert summary._null_experts(run, reporter) == {"moe_null_experts": 3, "real_experts_per_token": 1.0}
    assert summary._null_experts(argparse.Namespace(moe_null_experts=0), reporter) == {}


def test_a_run_that_goes_on_has_no_start(args, batches, tmp_path, capfd):  # noqa: F811
    health = Known(0.5)
    reporter = reporting.Reporter(tmp_path, {}, health)
    train(reporter, 3, samples_before=8)
    assert health.asked == 0 and "at the start" not in capfd.readouterr().err


def test_without_experts_nothing_is_told(args, batches, tmp_path, capfd):  # noqa: F811
    for health in (None, Known()):
        train(reporting.Reporter(tmp_path, {}, health), 1, samples_before=0)
    assert "at the start" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("spreads", "line"),
    [
        ([0.0093] * 4, "at the start | logits' std 0.0093 0.0093 0.0093 0.0093 | entropy 2.079 of 2.079"),
        (
            [0.0093, *[0.05] * 22, 0.21],
            "at the start | logits' std 0.0093 to 0.21 in 24 layers | entropy 2.079 of 2.079",
        ),
        ([math.nan], "at the start | logits' std nan | entropy 2.079 of 2.079"),
    ],
)
def test_the_start_fits_a_terminal_of_80_columns(monkeypatch, spreads, line):
    monkeypatch.setattr(reporting.sys, "__stderr__", argparse.Namespace(isatty=lambda: True, fileno=lambda: 2))
    monkeypatch.setattr(reporting.os, "get_terminal_size", lambda _: argparse.Namespace(columns=80))
    assert reporting._fitting(reporting._start_words(figures(*spreads), 8)) == line
