"""What a recurrent router takes, measured on its modules, against the formulas of the types that have one."""

import dataclasses

import pytest
import torch
from torch import nn

from rmoe_megablocks.launcher.config import REPOSITORY
from rmoe_megablocks.planning import read_settings, settings
from rmoe_megablocks.planning.counts import flops, memory, parameters, traffic
from rmoe_megablocks.planning.counts.routing import measure
from rmoe_megablocks.routing import RouterType, RoutingConfig, get_router_type, register, registry
from rmoe_megablocks.routing.registry import SharedCell
from tests.planning.built import arguments

H, E, P = 1280, 16, 128


@pytest.mark.parametrize(("dtype", "router_dtype"), [(2, 2), (2, 4), (4, 4), (2, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_gru(dtype, router_dtype, bias):
    cost = measure(get_router_type("gru"), RoutingConfig(H, E, P, bias), dtype, router_dtype)
    assert (cost.state_size, cost.shared) == (P, 6 * P**2 + 6 * P)
    assert cost.layer == P * H + E * P + (P + E if bias else 0)
    assert cost.flops == 2 * (H * P + 6 * P**2 + P * E)
    assert cost.kept == 6 * P * router_dtype  # x', three gates, the recurrent half of n, h
    assert cost.kept_once == (6 * P**2 * router_dtype if router_dtype != dtype else 0)


class Half(SharedCell):
    """h = tanh(W x + h * u): no bias, one matrix, a state of width P."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.state_size, config.state_size))
        self.u = nn.Parameter(torch.empty(config.state_size))

    def forward(self, p_TP, h_TP):
        p_TP = nn.functional.linear(p_TP, self.cast(self.weight, p_TP.dtype))
        return torch.tanh(p_TP if h_TP is None else p_TP + h_TP * self.cast(self.u, p_TP.dtype))


@pytest.fixture
def half():
    yield register(RouterType("half", "for a test", lambda config: config.state_size, Half))
    del registry._ROUTER_TYPES["half"]


def test_a_type_that_is_registered_later(half):
    settings._parser.cache_clear()  # its choices are the registered types
    paper = REPOSITORY / "configs" / "rmoe_0.9b_4x8xa100.yaml"
    gru, other = (read_settings(arguments(paper, typed)[0]) for typed in ([], ["--moe-router-type", "half"]))
    settings._parser.cache_clear()
    shared, per_layer = P**2 + P, P * H + E * P
    assert parameters.recurrence(other) == shared and parameters.router(other) == per_layer
    difference = parameters.model(gru).total - parameters.model(other).total
    assert difference == 6 * P**2 + 6 * P - shared
    assert parameters.model(other).routing == shared + 24 * per_layer
    assert flops.router(other) == 2 * (H * P + P**2 + P * E)
    # of one layer: the projection, h, and with fp32 routing the two parameters cast
    assert (other.routing.kept, other.routing.kept_once) == (2 * P * 4, 4 * (P**2 + P))
    assert memory.fullest(other, 32).routing < memory.fullest(gru, 32).routing
    assert traffic.traffic(other, 32).pipeline_state == traffic.traffic(gru, 32).pipeline_state


def test_a_state_of_another_width_travels():
    paper = REPOSITORY / "configs" / "rmoe_0.9b_4x8xa100.yaml"
    gru = read_settings(arguments(paper)[0])
    double = dataclasses.replace(gru, routing=dataclasses.replace(gru.routing, state_size=2 * P))
    ours, theirs = traffic.traffic(double, 32), traffic.traffic(gru, 32)
    assert ours.pipeline_state == 2 * theirs.pipeline_state
    assert ours.pipeline - ours.pipeline_state == theirs.pipeline - theirs.pipeline_state
