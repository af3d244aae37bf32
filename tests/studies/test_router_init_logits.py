"""How large the logits of every configuration's fresh routers are, within bands; and how the steps are measured."""

import math
import types

import pytest
import torch

from studies.router_init import chain, initial
from studies.router_init.gradients import Watch, kind_of

SMALL = [path.stem for path in initial.configurations() if not path.stem.startswith("rmoe_0.9b")]


def spreads(name: str, router: str, init: str) -> list[float]:
    return initial.by_layer(initial.sizes(initial.CONFIGS / f"{name}.yaml"), router, init)


def test_every_configuration_is_there_and_its_twin_has_its_sizes():
    names = {path.stem for path in initial.configurations()}
    assert {"tiny", "rmoe_0.9b_8xa100", "rmoe_enwik8_small", "rmoe_enwik8_depth_32"} <= names
    for path in initial.CONFIGS.glob("smoe_*.yaml"):
        twin = initial.sizes(path.with_stem("r" + path.stem[1:]))
        fixed = ("layers", "hidden_size", "experts", "std")
        assert all(getattr(initial.sizes(path), name) == getattr(twin, name) for name in fixed)


@pytest.mark.parametrize("name", SMALL)
def test_linear_is_what_its_sizes_say(name):
    """.02 sqrt(H) and 1/sqrt(3), times sqrt(1 - 1/E) as the mean over the experts is taken off."""
    sizes = initial.sizes(initial.CONFIGS / f"{name}.yaml")
    rest = math.sqrt(1 - 1 / sizes.experts)
    for init, expected in (("init_method", 0.02 * math.sqrt(sizes.hidden_size)), ("fan_in", 1 / math.sqrt(3))):
        for spread in spreads(name, "linear", init):
            assert spread == pytest.approx(expected * rest, rel=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_gru_starts_flat_with_init_method_and_less_so_with_fan_in(name):
    """With linear it is .2 to .4, and .5 to .6: fan_in makes up a part of the distance."""
    flat, parted = spreads(name, "gru", "init_method"), spreads(name, "gru", "fan_in")
    assert len(flat) == len(parted) == initial.sizes(initial.CONFIGS / f"{name}.yaml").layers
    low, high = (0.009, 0.02) if name == "tiny" else (0.017, 0.035)
    assert all(low < spread < high for spread in flat)
    assert all(0.07 < spread < 0.14 for spread in parted)


def test_the_chain_ends_in_the_same_logits_and_biases_make_more_of_a_small_state():
    sizes = initial.sizes(initial.CONFIGS / "tiny.yaml")
    for init, projected, same in (
        ("init_method", 0.02 * math.sqrt(128), (0.15, 0.45)),
        ("fan_in", 3**-0.5, (0.02, 0.1)),
    ):
        layers = chain.by_layer(sizes, init)
        assert len(layers) == 4
        for (x, _, _, logits, _), spread in zip(layers, spreads("tiny", "gru", init), strict=True):
            assert x == pytest.approx(projected, rel=0.03) and logits == pytest.approx(spread, rel=0.25)
        assert same[0] < layers[0][2] < same[1] and layers[0][2] < layers[-1][2]


def test_kinds_of_parameters():
    names = {
        "module.decoder.layers.0.mlp.router.routing_layer.projector": "projector",
        "module.decoder.layers.0.mlp.router.routing_layer.projector_bias": "projector",
        "module.decoder.layers.0.mlp.router.routing_layer.router": "router",
        "module.rnn_router.cell.weight_hh": "cell",
        "module.decoder.layers.3.mlp.router.weight": "linear router",
        "module.decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight": "others",
    }
    assert {name: kind_of(name) for name in names} == names


def test_norms_of_weights_gradients_and_steps():
    """Weights 3 and 4 make a norm of 5; the gradient (.3, .4) was clipped from a norm of 2 to 1; the step is (0, 1)."""
    model = torch.nn.Module()
    model.rnn_router = torch.nn.Module()
    model.rnn_router.cell = torch.nn.Linear(2, 1, bias=False)
    weight = model.rnn_router.cell.weight
    weight.data = torch.tensor([[3.0, 4.0]])
    watch = Watch([2], clip=1.0)
    watch.on_model([model])
    told = dict(loss_dict={}, learning_rate=0.1, skipped_iter=0)
    weight.main_grad = torch.tensor([[0.3, 0.4]])
    watch.on_iteration(iteration=1, grad_norm=2.0, **told)
    with torch.no_grad():
        weight[0, 1] += 1
    watch.on_iteration(iteration=2, grad_norm=2.0, **told)
    (record,) = watch.records
    assert record["iteration"] == 2 and record["grad_norm"] == 2.0
    expected = {"weight": 5.0, "gradient": 1.0, "step": 1.0}
    assert record["kinds"]["cell"] == pytest.approx(expected, rel=1e-5)


def test_gradients_below_the_clip_are_as_they_are():
    model = types.SimpleNamespace(named_parameters=lambda: [("router.weight", parameter)])
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.main_grad = torch.tensor([0.5])
    for clip in (1.0, 0.0):
        watch = Watch([1], clip)
        watch.on_model([model])
        watch.on_iteration(loss_dict={}, learning_rate=0.0, iteration=1, skipped_iter=0, grad_norm=0.5)
        assert watch.records[0]["kinds"]["others"] == {"weight": 2.0, "gradient": 0.5, "step": 0.0}
