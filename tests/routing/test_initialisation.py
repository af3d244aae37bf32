"""What a layer owns of its router is drawn as asked: torch.nn.Linear's numbers, or those of init_method."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from rmoe_megablocks.routing import INIT, LAYER_INITS, RouterLayer, RoutingConfig, fan_in_
from tests.routing.built import config_of, layer_of, shared_of

H, P, E = 512, 256, 64


def drawn(layer_init: str, bias: bool, **sizes) -> RouterLayer:
    torch.manual_seed(0)
    values = dict(hidden_size=H, num_experts=E, state_size=P) | sizes
    return layer_of(config_of(**values, bias=bias, layer_init=layer_init))


@pytest.mark.parametrize("bias", [False, True])
def test_fan_in_draws_what_torchs_linear_draws(bias):
    layer = drawn("fan_in", bias)
    torch.manual_seed(0)
    projector, router = nn.Linear(H, P, bias=bias), nn.Linear(P, E, bias=bias)
    for ours, theirs in (
        (layer.projector, projector.weight),
        (layer.router, router.weight),
        *(((layer.projector_bias, projector.bias), (layer.router_bias, router.bias)) if bias else ()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_fan_in_has_the_bounds_and_the_spread_of_its_inputs():
    layer = drawn("fan_in", True)
    for weight, inputs in ((layer.projector, H), (layer.router, P)):
        bound = 1 / math.sqrt(inputs)
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert weight.mean().item() == pytest.approx(0, abs=0.01 * bound)
    assert 0.95 / math.sqrt(H) < layer.projector_bias.abs().max() <= 1 / math.sqrt(H)
    assert 0.85 / math.sqrt(P) < layer.router_bias.abs().max() <= 1 / math.sqrt(P)


@pytest.mark.parametrize("bias", [False, True])
def test_init_method_draws_the_matrices_in_turn_and_nothing_else(bias):
    """Bit for bit what it drew when there was no choice."""
    torch.manual_seed(0)
    projector, router = (torch.empty(P, H).normal_(0, 0.02), torch.empty(E, P).normal_(0, 0.02))
    following = torch.rand(1)
    layer = drawn("init_method", bias)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(layer.projector, projector) and torch.equal(layer.router, router)
    assert not bias or not (layer.projector_bias.any() or layer.router_bias.any())
    assert RoutingConfig(H, E)[INIT] == "init_method"


def test_fan_in_asks_no_init_method():
    def init_method(weight):
        raise AssertionError("asked")

    config = config_of(H, E, P, layer_init="fan_in", init_method=init_method)
    layer = layer_of(config)
    before = layer.projector.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.projector, before) and layer.projector.abs().max() <= 1 / math.sqrt(H)


def test_gradients_know_nothing_of_how_the_weights_were_drawn():
    config = config_of(16, 4, 8, bias=True)
    cell = shared_of(config)
    x, h, weight = torch.randn(5, 16), torch.randn(5, 8), torch.randn(5, 4)
    layers = [drawn(init, True, hidden_size=16, num_experts=4, state_size=8) for init in LAYER_INITS]
    layers[1].load_state_dict(layers[0].state_dict())
    gradients = []
    for layer in layers:
        logits, state = layer(x, h, cell)
        gradients.append(torch.autograd.grad((logits * weight).sum() + state.sum(), list(layer.parameters())))
    assert len(gradients[0]) == 4
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second) and first.abs().max() > 0


def test_one_input_and_a_lone_matrix():
    torch.manual_seed(0)
    weight = torch.empty(1000, 1)
    fan_in_(weight)
    assert 0.99 < weight.abs().max() <= 1


@pytest.mark.parametrize("name", ["zeros", None, "FAN_IN"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="moe_router_init must be (one of init_method, fan_in|a word), got"):
        config_of(8, 4, 4, layer_init=name)


@pytest.mark.parametrize("sizes", [(128, 64), (264, 128), (1280, 128)])
def test_the_spread_of_outputs_does_not_depend_on_sizes(sizes):
    """1/sqrt(3) a matrix for inputs of variance 1; with N(0, .02) it is .02 sqrt(inputs)."""
    inputs, outputs = sizes
    torch.manual_seed(0)
    weight, x = torch.empty(outputs, inputs), torch.randn(4000, inputs)
    fan_in_(weight)
    assert (x @ weight.T).std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)
    partial(nn.init.normal_, std=0.02)(weight)
    assert (x @ weight.T).std().item() == pytest.approx(0.02 * math.sqrt(inputs), rel=0.05)
