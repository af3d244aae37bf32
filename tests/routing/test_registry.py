"""Router types by name, what a type must have, its sizes and its arguments."""

import math

import pytest
import torch

from rmoe_megablocks.routing import (
    INIT,
    STATE_SIZE,
    Argument,
    RouterLayer,
    RoutingConfig,
    SharedRouting,
    get_router_type,
    owners,
    register,
    registry,
    router_types,
)
from tests.routing.built import config_of, layer_of, shared_of

ALL = ("linear", "cosine", "eda", "gru", "hyper", "lstm", "mlp", "omni", "product_key", "random", "rnn", "xmoe")


def test_the_choices():
    assert router_types() == ALL
    config = config_of(8, 4, 6)
    linear, gru = get_router_type("linear"), get_router_type("gru")
    assert linear.state_size(config) == 0 and not linear.replaces_hosts and linear.arguments == (INIT,)
    assert gru.state_size(config) == 6 and gru.replaces_hosts
    assert all(get_router_type(name).summary[0] not in "_<" for name in ALL)


def test_unknown_and_duplicate_names():
    with pytest.raises(ValueError, match="unknown router type 'lsmt', did you mean lstm\\? \\(known: linear, cosine"):
        get_router_type("lsmt")
    with pytest.raises(ValueError, match="'gru' is already registered"):
        register("gru")(type("Again", (RouterLayer,), {"route": lambda self, *args: None}))


class Fit(RouterLayer):
    """A type for a test."""

    def route(self, x_TH, h_TP, shared, dtype):
        return x_TH[..., : self.config.num_experts], None


WIDTH = Argument("--moe-router-mlp-hidden-size", 7, "another type has it")
UNFIT = {
    "no class": (1, "1 is no subclass of rmoe_megablocks.routing.RouterLayer"),
    "another class": (torch.nn.Linear, "is no subclass of rmoe_megablocks.routing.RouterLayer"),
    "no route": (type("NoRoute", (RouterLayer,), {}), "NoRoute has no method route(x_TH, h_TP, shared, dtype)"),
    "shared": (type("A", (Fit,), {"shared": torch.nn.Linear}), "A.shared is no subclass of SharedRouting"),
    "argument": (type("A", (Fit,), {"arguments": ("--x",)}), "'--x' in A.arguments is no Argument"),
    "spelling": (type("A", (Fit,), {"arguments": (Argument("--x", 1, ""),)}), "--x must begin with --moe-router-"),
    "taken": (type("A", (Fit,), {"arguments": (WIDTH,)}), "--moe-router-mlp-hidden-size is another type's argument"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_the_seam_cannot_use(kind):
    layer, said = UNFIT[kind]
    with pytest.raises(ValueError) as caught:
        register("unfit")(layer)
    assert said in str(caught.value) and "router type 'unfit'" in str(caught.value)
    assert "unfit" not in router_types()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.at_all:Router", "cannot import 'nowhere.at_all' (ModuleNotFoundError: No module named 'nowhere')"),
        ("math:Router", "math has no Router"),
        ("math:pi", "3.14159.* is no subclass"),
        (":Router", "cannot import ''"),
        ("tests.routing.raises_at_import:Router", "(ZeroDivisionError: division by zero at "),
    ],
)
def test_ones_own_that_cannot_be_used(name, said):
    with pytest.raises(ValueError) as caught:
        get_router_type(name)
    text = str(caught.value)
    assert "\n" not in text and f"router type {name!r}" in text
    assert said.partition(".*")[0] in text and said.rpartition(".*")[2] in text


def test_ones_own():
    name = f"{__name__}:Fit"
    try:
        assert get_router_type(name).summary == "A type for a test"
        assert get_router_type(name) is get_router_type(name)
    finally:
        registry.unregister(name)


def test_an_installed_packages_type(monkeypatch, tmp_path):
    """Of a path that has become longer since types were last asked for, too."""
    assert "installed" not in router_types()
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ninstalled = {__name__}:Fit\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "installed" in router_types()
    try:
        assert get_router_type("installed").layer.__name__ == "Fit"
    finally:
        registry.unregister("installed")


def test_arguments_know_their_types_and_their_values():
    assert owners(STATE_SIZE) == ["eda", "gru", "lstm", "rnn"]
    with pytest.raises(ValueError, match="moe_router_rnn_hidden_size must be a whole number, got True"):
        RoutingConfig(8, 4, {STATE_SIZE: True})
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        STATE_SIZE.read("0")
    assert STATE_SIZE.read("5") == 5 and RoutingConfig(8, 4)[STATE_SIZE] == 128


@pytest.mark.parametrize("name", ["hidden_size", "num_experts", "state_size"])
def test_sizes_must_be_positive(name):
    sizes = {"hidden_size": 8, "num_experts": 4, "state_size": 6} | {name: 0}
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        config_of(**sizes)


def test_product_keys_need_a_square_number_of_experts():
    with pytest.raises(ValueError, match="needs a square number of experts, as 16 or 64, got 8"):
        layer_of(RoutingConfig(8, 8), "product_key")


def test_parameter_counts_are_the_papers():
    """0.91B: 24 x (1280 p + 16 p) for projectors and routers and 6 p^2 + 6 p for the GRU, p = 128."""
    config = config_of(1280, 16, 128)
    layer = sum(p.numel() for p in layer_of(config).parameters())
    gru = sum(p.numel() for p in shared_of(config).parameters())
    assert (layer, gru) == (1280 * 128 + 16 * 128, 6 * 128**2 + 6 * 128)


def test_initialisation():
    torch.manual_seed(0)
    standard = shared_of(config_of(64, 4, 64))
    bound = 1 / math.sqrt(64)
    for parameter in standard.parameters():
        assert parameter.abs().max() <= bound and parameter.std() > bound / 3
    config = config_of(512, 16, 64, bias=True, rnn_init="init_method")
    chosen = shared_of(config)
    assert chosen.weight_hh.std().item() == pytest.approx(0.02, rel=0.1)
    assert chosen.bias_hh.std().item() == pytest.approx(0.02, rel=0.2)  # drawn, as the released code draws it
    layer = layer_of(config)
    assert layer.projector.std().item() == pytest.approx(0.02, rel=0.1) and layer.router_bias.abs().max() == 0
    with pytest.raises(ValueError, match="moe_router_rnn_init must be one of standard, init_method"):
        config_of(8, 4, 4, rnn_init="orthogonal")


def test_a_shared_modules_base_says_which_stages_lack_it():
    assert SharedRouting(RoutingConfig(8, 4)).unused_by(set()) == [0]
    assert SharedRouting(RoutingConfig(8, 4)).unused_by({2, 3}) == []
