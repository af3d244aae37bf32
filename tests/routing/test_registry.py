"""Router types by name, their sizes and their initialisation."""

import math

import pytest
import torch

from rmoe_megablocks.routing import LayerRouting, RouterType, RoutingConfig, get_router_type, register, router_types


def test_the_choices():
    assert router_types() == ("linear", "gru")
    config = RoutingConfig(hidden_size=8, num_experts=4, state_size=6)
    assert get_router_type("linear").state_size(config) == 0 and not get_router_type("linear").recurrent
    assert get_router_type("gru").state_size(config) == 6 and get_router_type("gru").recurrent


def test_unknown_and_duplicate_names():
    with pytest.raises(ValueError, match="unknown router type 'lstm'; known: linear, gru"):
        get_router_type("lstm")
    with pytest.raises(ValueError, match="'gru' is already registered"):
        register(RouterType("gru", "again", state_size=lambda config: 1))


@pytest.mark.parametrize("name", ["hidden_size", "num_experts", "state_size"])
def test_sizes_must_be_positive(name):
    sizes = {"hidden_size": 8, "num_experts": 4, "state_size": 6} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        RoutingConfig(**sizes)


def test_parameter_counts_are_the_papers():
    """0.91B: 24 x (1280 p + 16 p) for projectors and routers and 6 p^2 + 6 p for the GRU, p = 128."""
    config = RoutingConfig(hidden_size=1280, num_experts=16, state_size=128)
    layer = sum(p.numel() for p in LayerRouting(config).parameters())
    gru = sum(p.numel() for p in get_router_type("gru").build_shared(config).parameters())
    assert (layer, gru) == (1280 * 128 + 16 * 128, 6 * 128**2 + 6 * 128)


def test_initialisation():
    torch.manual_seed(0)
    standard = get_router_type("gru").build_shared(RoutingConfig(64, 4, 64))
    bound = 1 / math.sqrt(64)
    for parameter in standard.parameters():
        assert parameter.abs().max() <= bound and parameter.std() > bound / 3
    config = RoutingConfig(512, 16, 64, bias=True, rnn_init="init_method")
    chosen = get_router_type("gru").build_shared(config)
    assert chosen.weight_hh.std().item() == pytest.approx(0.02, rel=0.1)
    assert chosen.bias_hh.std().item() == pytest.approx(0.02, rel=0.2)  # drawn, as the released code draws it
    layer = LayerRouting(config)
    assert layer.projector.std().item() == pytest.approx(0.02, rel=0.1) and layer.router_bias.abs().max() == 0
    with pytest.raises(ValueError, match="rnn_init must be one of standard, init_method"):
        RoutingConfig(8, 4, 4, rnn_init="orthogonal")
