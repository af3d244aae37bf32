"""What types draw whatever --moe-router-init says, and that it decides about the rest."""

import math

import pytest
import torch

from rmoe_megablocks.routing import FAN_IN, HEAD, INIT, LAYER_INITS, RoutingConfig, get_router_type

H, E = 64, 16


def built(name: str, **chosen):
    """A layer, and what is shared."""
    torch.manual_seed(0)
    config = RoutingConfig(H, E, chosen)
    return get_router_type(name).build_layer(config), get_router_type(name).build_shared(config)


def heads(kind: str) -> list:
    """A head that reads x, and one that reads a state, with each initialisation."""
    return [
        head
        for init in LAYER_INITS
        for head in (
            built(kind, **{INIT.dest: init})[0].reader,
            built("gru", **{HEAD.dest: kind, INIT.dest: init})[0].head,
        )
    ]


@pytest.mark.parametrize("tau", [0.3, 0.07])
def test_cosine(tau):
    for head in heads("cosine"):
        e = head.embeddings
        torch.testing.assert_close(e @ e.T, 0.32**2 * torch.eye(E), rtol=0, atol=1e-6)
        assert head.log_scale.exp().item() == pytest.approx(1 / 0.3, rel=1e-6)
    layer, _ = built("cosine", moe_router_temperature=tau)
    assert layer.reader.log_scale.exp().item() == pytest.approx(1 / tau, rel=1e-6)


def test_cosines_learnt_scale_ends_at_100():
    layer, _ = built("cosine")
    x = torch.randn(5, H)
    for scale, expected in ((50.0, 50.0), (1e4, 100.0)):
        with torch.no_grad():
            layer.reader.log_scale.fill_(math.log(scale))
        aligned = layer(layer.reader.embeddings)[0].diagonal()
        torch.testing.assert_close(aligned, torch.full((E,), expected), rtol=1e-5, atol=0)
    assert layer(x)[0].abs().max() <= 100


def test_xmoe():
    for head in heads("xmoe"):
        e = head.embeddings
        torch.testing.assert_close(e @ e.T, 1.5**2 * torch.eye(E), rtol=0, atol=1e-5)


def test_xmoe_with_more_experts_than_dimensions():
    layer, _ = built("xmoe", moe_router_xmoe_hidden_size=8)
    torch.testing.assert_close(layer.reader.embeddings.norm(dim=1), torch.full((E,), 1.5))


@pytest.mark.parametrize("init", LAYER_INITS)
def test_eda(init):
    layer, _ = built("eda", moe_router_init=init)
    assert (layer.gamma == 1).all() and (layer.norm == 1).all()
    for name, inputs in (("projector", H), ("fc1", 128), ("fc2", 128), ("router", 128)):
        check_matrix(init, getattr(layer, name), inputs, getattr(layer, name + "_bias", None))


@pytest.mark.parametrize("init", LAYER_INITS)
def test_hyper(init):
    layer, _ = built("hyper", moe_router_init=init)
    check_matrix(FAN_IN, layer.fc1, H, layer.fc1_bias)
    check_matrix(FAN_IN, layer.fc2, 256, layer.fc2_bias)
    assert layer.embedding.std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("init", LAYER_INITS)
@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("mlp", {"fc1": H, "fc2": 256}),
        ("random", {"weight": H}),
        ("product_key", {"reader.rows": H, "reader.columns": H}),
        ("xmoe", {"reader.projection": H}),
        ("omni", {"weight": H}),
        ("rnn", {"projector": H, "router": 128}),
        ("lstm", {"projector": H, "router": 128}),
    ],
)
def test_matrices_are_drawn_as_asked(init, name, matrices):
    layer, shared = built(name, moe_router_init=init)
    found = dict((layer if name != "omni" else shared).named_parameters())
    for matrix, inputs in matrices.items():
        check_matrix(init, found[matrix], inputs, found.get(matrix + "_bias"))


def check_matrix(init: str, weight, inputs: int, bias) -> None:
    """U(+-1/sqrt(inputs)) with its bias, or the model's N(0, 0.02) and a bias of 0."""
    if init == FAN_IN:
        bound = 1 / math.sqrt(inputs)
        for tensor in (weight, *(() if bias is None else (bias,))):
            assert 0.6 * bound < tensor.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    else:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert bias is None or not bias.any()


@pytest.mark.parametrize("name", ["gru", "rnn", "lstm"])
def test_cells_are_drawn_as_torchs(name):
    _, cell = built(name, moe_router_rnn_hidden_size=64)
    for parameter in cell.parameters():
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8
