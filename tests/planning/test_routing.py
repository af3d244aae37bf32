"""What a router type takes, measured on its modules, against the formulas of the types."""

import json

import pytest
import torch
from torch import nn

from rmoe_megablocks import cli
from rmoe_megablocks.launcher.config import REPOSITORY
from rmoe_megablocks.planning import read_settings
from rmoe_megablocks.planning.counts import flops, memory, parameters, traffic
from rmoe_megablocks.planning.counts.routing import Operations, measure
from rmoe_megablocks.routing import (
    RECURRENCE,
    RouterLayer,
    RoutingConfig,
    SharedRouting,
    get_router_type,
    register,
    registry,
)
from rmoe_megablocks.routing.parts.recurrent import STATE_SIZE, RecurrentLayer
from tests.planning.built import arguments
from tests.routing.built import config_of

H, E, P, D, N = 1280, 16, 128, 16, 256
PAPER = REPOSITORY / "configs" / "rmoe_0.9b_4x8xa100.yaml"


def settings_of(*typed):
    return read_settings(arguments(PAPER, list(typed))[0])


@pytest.mark.parametrize(("dtype", "router_dtype"), [(2, 2), (2, 4), (4, 4), (2, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_gru(dtype, router_dtype, bias):
    cost = measure(get_router_type("gru"), config_of(H, E, P, bias=bias, impl="eager"), dtype, router_dtype)
    assert (cost.state_size, cost.shared) == (P, 6 * P**2 + 6 * P)
    assert cost.layer == P * H + E * P + (P + E if bias else 0)
    assert cost.forward == Operations(2 * (H * P + 6 * P**2 + P * E), 0)
    assert cost.backward == Operations(2 * cost.forward.token, 0)
    assert cost.kept == 6 * P * router_dtype  # x', three gates, the recurrent half of n, h
    assert cost.kept_once == (6 * P**2 * router_dtype if router_dtype != dtype else 0)
    assert cost.frozen_shared == cost.frozen_layer == cost.buffers_shared == cost.buffers_layer == 0


# what all layers share, what one owns, of these frozen, forward FLOPs of a token and of a call, backward likewise
HE, HD = H * E, H * D
MADE = E * (H + 1)  # what hyper's network makes
SIZES = {
    "mlp": (0, N * H + N + E * N + E, 0, 2 * (N * H + E * N), 0, 4 * (N * H + E * N), 0),
    "random": (0, HE, HE, 2 * HE, 0, 2 * HE, 0),  # no gradient of the weight
    "hyper": (
        *(0, H + N * H + N + MADE * N + MADE, N * H + N + MADE * N + MADE),
        *(2 * HE, 2 * (N * H + MADE * N), 4 * HE, 2 * (N * H + MADE * N)),
    ),
    "cosine": (0, HE + 1, 0, 2 * HE, 0, 4 * HE, 0),
    "xmoe": (0, HD + E * D, 0, 2 * (HD + E * D), 0, 4 * (HD + E * D), 0),
    "product_key": (0, 2 * 4 * H, 0, 2 * 2 * 4 * H, 0, 4 * 2 * 4 * H, 0),
    "omni": (HE, 0, 0, 2 * HE, 0, 4 * HE, 0),
    "rnn": (
        *(2 * P**2 + 2 * P, P * H + E * P, 0),
        *(2 * (P * H + 2 * P**2 + E * P), 0, 4 * (P * H + 2 * P**2 + E * P), 0),
    ),
    "lstm": (
        *(8 * P**2 + 8 * P, P * H + E * P, 0),
        *(2 * (P * H + 8 * P**2 + E * P), 0, 4 * (P * H + 8 * P**2 + E * P), 0),
    ),
    "eda": (
        *(0, P * H + 2 * P**2 + E * P + 5 * P, 0),
        *(2 * (P * H + 2 * P**2 + E * P), 0, 4 * (P * H + 2 * P**2 + E * P), 0),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_operations(name):
    found = measure(get_router_type(name), RoutingConfig(H, E), 4, 4)
    sizes = (found.shared, found.layer, found.frozen_shared + found.frozen_layer)
    operations = (found.forward.token, found.forward.call, found.backward.token, found.backward.call)
    assert (*sizes, *operations) == SIZES[name]


def test_every_type_of_this_package_is_here():
    of_tests = {name for name in registry.router_types() if ":" in name}
    assert {*SIZES, "linear", "gru"} == set(registry.router_types()) - of_tests


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("gru", P),
        ("rnn", P),
        ("eda", P),
        ("lstm", 2 * P),
        ("mlp", 0),
        ("omni", 0),
        ("gru --moe-router-recurrence none", 0),
        ("lstm --moe-router-recurrence none", 0),
        ("gru --moe-router-recurrence detach", P),
        ("mlp --moe-router-residual 0.5", E),
        ("gru --moe-router-residual 0.5", P + E),
        ("lstm --moe-router-residual 1.0", 2 * P + E),
        ("gru --moe-router-recurrence none --moe-router-residual 1.0", E),
    ],
)
def test_the_width_that_travels(typed, size):
    found = settings_of("--moe-router-type", *typed.split())
    sent = traffic.traffic(found, 32)
    steps, tokens = 1120 // (2 * 16), 2 * 4096
    assert found.routing.state_size == size
    assert sent.pipeline_state == steps * tokens * size * 4
    assert sent.pipeline - sent.pipeline_state == steps * tokens * H * 2
    # and is what full recompute keeps of a layer
    full = memory.with_recompute(found, "full")
    assert memory._carried(full, 1) == tokens * (H * 2 + size * 4)
    assert memory._carried(full, 0) == tokens * H * 2  # there is none before the first


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_a_cut_gradient_is_not_computed(name):
    gates = {"rnn": 1, "lstm": 4}[name]
    full, detach = (
        measure(get_router_type(name), RoutingConfig(H, E, {RECURRENCE: mode}), 4, 4) for mode in ("full", "detach")
    )
    assert full.forward == detach.forward
    assert full.backward.token - detach.backward.token == 2 * gates * P**2  # that of the previous state


def test_no_recurrence_is_no_product_with_a_state():
    cost = measure(get_router_type("gru"), RoutingConfig(H, E, {RECURRENCE: "none"}), 4, 4)
    assert cost.forward.token == 2 * (H * P + 3 * P**2 + P * E)


def test_frozen_weights_are_weights_and_nothing_else():
    """fp32 master copies, gradients, Adam's moments, their reduction and the gather of new weights: of none."""
    hyper, mlp = (
        settings_of("--moe-router-type", name, "--pipeline-model-parallel-size", "1") for name in ("hyper", "mlp")
    )
    frozen = 24 * SIZES["hyper"][2]
    found, other = parameters.model(hyper), parameters.model(mlp)
    assert (found.frozen, other.frozen) == (frozen, 0)
    trained = found.total - frozen - other.total  # beside mlp's
    assert trained == 24 * (H - SIZES["mlp"][1])
    ours, theirs = memory.on_rank(hyper, 32, 0), memory.on_rank(mlp, 32, 0)
    assert ours.frozen == 2 * frozen and theirs.frozen == 0
    assert ours.weights - theirs.weights == 2 * (frozen + trained)
    assert ours.gradients - theirs.gradients == 4 * trained
    assert ours.optimizer - theirs.optimizer == pytest.approx(12 * trained / 32, abs=12)
    assert ours.routing - theirs.routing == pytest.approx(ours.total - theirs.total, abs=100)
    sent = traffic.traffic(hyper, 32).data_parallel - traffic.traffic(mlp, 32).data_parallel
    assert sent == pytest.approx(trained * 31 / 32 * (4 + 2), abs=2)


def test_frozen_weights_have_a_line(capsys):
    def plan(*argv):
        assert cli.main(["plan", str(PAPER), "--moe-router-type", *argv]) == 0
        return capsys.readouterr().out

    page, without = plan("hyper"), plan("gru")
    assert f"of it frozen          {24 * SIZES['hyper'][2]:,}" in page and "of it frozen weights" in page
    assert "frozen" not in without
    found, other = json.loads(plan("hyper", "--json")), json.loads(plan("gru", "--json"))
    assert found["parameters"]["frozen"] == 24 * SIZES["hyper"][2] and other["parameters"]["frozen"] == 0
    assert found["memory_per_rank"]["frozen"] == 2 * 12 * SIZES["hyper"][2]  # of one of two stages
    assert other["memory_per_rank"]["frozen"] == 0


def test_a_network_for_all_tokens_is_computed_once_a_call():
    found = settings_of("--moe-router-type", "hyper")
    (token, call), tokens = SIZES["hyper"][3:5], 2 * 4096
    assert flops.router(found)[0] == token + call / tokens
    assert flops.flops(found).routing == int(24 * (token + call / tokens))


def test_training_is_forward_and_the_backward_that_there_is():
    random, linear = (flops.flops(settings_of("--moe-router-type", name)) for name in ("random", "linear"))
    assert random.forward == linear.forward
    assert linear.training == 3 * linear.forward
    assert linear.training - random.training == 24 * 2 * HE


class HalfCell(SharedRouting):
    """h = tanh(W x + h * u): no bias, one matrix, a state of width P; a buffer that is added."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        size = config[STATE_SIZE]
        self.weight = nn.Parameter(torch.empty(size, size))
        self.u = nn.Parameter(torch.empty(size))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))

    def forward(self, p_TP, h_TP):
        p_TP = nn.functional.linear(p_TP, self.cast(self.weight, p_TP.dtype))
        return torch.tanh(p_TP if h_TP is None else p_TP + h_TP * self.cast(self.u, p_TP.dtype))


@pytest.fixture
def half():
    @register("half")
    class Half(RecurrentLayer):
        """for a test"""

        shared = HalfCell

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    yield Half
    registry.unregister("half")


def test_a_type_that_is_registered_later(half):
    gru, other = settings_of(), settings_of("--moe-router-type", "half")
    shared, per_layer = P**2 + P, P * H + E * P
    assert parameters.recurrence(other).total == shared and parameters.router(other).total == per_layer
    difference = parameters.model(gru).total - parameters.model(other).total
    assert difference == 6 * P**2 + 6 * P - shared
    assert parameters.model(other).routing == shared + 24 * per_layer
    assert flops.router(other) == (2 * (H * P + P**2 + P * E), 4 * (H * P + P**2 + P * E))
    # of one layer: the projection, h, and with fp32 routing the two parameters cast
    assert (other.routing.kept, other.routing.kept_once) == (2 * P * 4, 4 * (P**2 + P))
    assert memory.fullest(other, 32).routing < memory.fullest(gru, 32).routing
    assert traffic.traffic(other, 32).pipeline_state == traffic.traffic(gru, 32).pipeline_state
    # buffers: a float one becomes bf16 with the model, whole numbers stay
    assert (other.routing.buffers_shared, other.routing.buffers_layer) == (2 * P, 3 * 8)
    (found, counts) = memory.on_rank(other, 32, 0), parameters.stage(other, 0)
    stored = counts.dense_on_rank(other) + counts.experts_on_rank(other)
    assert found.weights == 2 * stored + 2 * P + 12 * 24


def test_a_type_that_is_nowhere_registered(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    name = f"{__name__}:Own"
    try:
        found = settings_of("--moe-router-type", name)
        assert parameters.router(found).total == E * H and found.routing.state_size == 0
        assert found.not_counted == ()
    finally:
        registry.unregister(name)


class Own(RouterLayer):
    """For a test."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def route(self, x_TH, h_TP, shared, dtype):
        return nn.functional.linear(x_TH.to(dtype), self.weight.to(dtype)), None
