"""Projectors and heads that layers share: the equations with one matrix for several layers, and their gradients."""

import itertools
import math

import pytest
import torch

from rmoe_megablocks.planning.counts.routing import measure
from rmoe_megablocks.routing import (
    BIAS,
    HEAD,
    SHARE_HEAD,
    SHARE_PROJECTOR,
    STATE_SIZE,
    RoutingConfig,
    get_router_type,
)
from rmoe_megablocks.routing.parts.heads import TEMPERATURE, XMOE_SIZE

T, H, P, E, LAYERS = 5, 7, 4, 4, 5
DOUBLE = torch.float64
RECURRENT = ("gru", "rnn", "lstm")
CELLS = {"gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell}
SHARES = [("all", "layer"), ("layer", "all"), ("all", "all"), ("2", "3"), ("3", "layer"), ("1", "5")]


def config_of(projector="layer", head="layer", more=None) -> RoutingConfig:
    options = {STATE_SIZE: P, BIAS: True, SHARE_PROJECTOR: projector, SHARE_HEAD: head} | (more or {})
    return RoutingConfig(H, E, options, LAYERS, lambda w: torch.nn.init.normal_(w, std=0.5))


def built(name: str, config: RoutingConfig):
    """Layers and what they share, in float64, with biases that are not 0."""
    torch.manual_seed(0)
    kind = get_router_type(name)
    layers = torch.nn.ModuleList(kind.build_layer(config) for _ in range(LAYERS)).to(DOUBLE)
    for index, layer in enumerate(layers):
        layer.index = index
    shared = kind.build_shared(config).to(DOUBLE)
    for parameter in (*layers.parameters(), *shared.parameters()):
        if parameter.ndim == 1 and len(parameter) > 1:
            torch.nn.init.normal_(parameter)
    return layers, shared


def run(layers, shared, inputs):
    h, results = None, []
    for layer, x in zip(layers, inputs, strict=True):
        logits, h = layer(x, h, shared)
        results += [logits, h]
    return results


def block(share: str, index: int) -> int:
    return {"all": 0, "layer": index}.get(share) if share in ("all", "layer") else index // int(share)


def read(kind: str, module, h):
    """The head's definition: routers.md."""
    if kind == "linear":
        return h @ module.weight.T + module.bias
    if kind == "cosine":
        cosines = torch.cosine_similarity(h[:, None], module.embeddings[None], dim=-1)
        return cosines * module.log_scale.clamp(max=math.log(100)).exp()
    if kind == "xmoe":
        e = module.embeddings / module.embeddings.norm(dim=1, keepdim=True)
        return (h @ module.projection.T) @ e.T / 0.25
    return torch.stack([h @ a + h @ b for a in module.rows for b in module.columns], dim=-1)


def expected(name, layers, shared, inputs, projector, head, kind="linear"):
    """torch's own cell between matrices looked up by block."""
    cell = CELLS[name](P, P, dtype=DOUBLE)
    weights = {n: getattr(shared, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    state, results = None, []
    for index, x in enumerate(inputs):
        own = layers[index]
        if projector == "layer":
            weight, bias = own.projector, own.projector_bias
        else:
            weight, bias = shared.projectors[block(projector, index)].parameters()
        state = torch.func.functional_call(cell, weights, (x @ weight.T + bias, state))
        h = state[0] if name == "lstm" else state
        if head != "layer":
            logits = read(kind, shared.heads[block(head, index)], h)
        elif kind == "linear":
            logits = h @ own.router.T + own.router_bias
        else:
            logits = read(kind, own.head, h)
        results += [logits, torch.cat(state, -1) if name == "lstm" else state]
    return results


def assert_same(name, config, projector, head, kind="linear"):
    layers, shared = built(name, config)
    inputs = [torch.randn(T, H, dtype=DOUBLE, requires_grad=True) for _ in range(LAYERS)]
    leaves = [*inputs, *layers.parameters(), *shared.parameters()]
    both = []
    for forward in (run, lambda *a: expected(name, *a, projector, head, kind)):
        results = forward(layers, shared, inputs)
        torch.manual_seed(1)
        loss = sum((result * torch.randn_like(result)).sum() for result in results)
        both.append([*results, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*both, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("projector", "head"), SHARES)
def test_values_and_gradients_are_those_of_shared_matrices(name, projector, head):
    """Autograd through the reference adds up what each layer sends to the matrix that it shares."""
    assert_same(name, config_of(projector, head), projector, head)


@pytest.mark.parametrize("kind", ["cosine", "xmoe", "product_key"])
@pytest.mark.parametrize("head", ["layer", "2", "all"])
def test_other_heads_are_shared_too(kind, head):
    options = {HEAD: kind, TEMPERATURE: 0.3 if kind == "cosine" else 0.25, XMOE_SIZE: 3}
    options = {argument: value for argument, value in options.items() if kind != "product_key" or argument is HEAD}
    assert_same("gru", config_of("2", head, options), "2", head, kind)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_shared_gradient_is_the_sum_of_the_layers(name):
    """Each layer of the unshared model has a copy of the shared matrix: their gradients add up to the shared one's."""
    layers, shared = built(name, config_of("2", "all"))
    own_layers, cell = built(name, config_of())
    with torch.no_grad():
        for ours, theirs in zip(cell.parameters(), shared.parameters(), strict=False):
            ours.copy_(theirs)
        for index, own in enumerate(own_layers):
            for ours, theirs in zip(
                (own.projector, own.projector_bias, own.router, own.router_bias),
                (*shared.projectors[index // 2].parameters(), *shared.heads[0].parameters()),
                strict=True,
            ):
                ours.copy_(theirs)
    inputs = [torch.randn(T, H, dtype=DOUBLE) for _ in range(LAYERS)]
    for model in ((layers, shared), (own_layers, cell)):
        sum(result.square().sum() for result in run(*model, inputs)).backward()
    for b in range(3):
        members = own_layers[2 * b : 2 * b + 2]
        for name, parameter in (("projector", "weight"), ("projector_bias", "bias")):
            total = sum(getattr(member, name).grad for member in members)
            torch.testing.assert_close(getattr(shared.projectors[b], parameter).grad, total, rtol=0, atol=1e-12)
    total = sum(own.router.grad for own in own_layers)
    torch.testing.assert_close(shared.heads[0].weight.grad, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("kind", ["linear", "xmoe"])
def test_gradcheck(name, kind):
    layers, shared = built(name, config_of("2", "3", {HEAD: kind}))
    inputs = [torch.randn(2, H, dtype=DOUBLE) for _ in range(LAYERS)]
    names = [name for name, _ in shared.named_parameters()]

    def logits(*weights):
        parts = dict(zip(names, weights, strict=True))
        call = torch.func.functional_call
        return torch.cat(call(Run(layers, shared), {f"shared.{n}": w for n, w in parts.items()}, (inputs,)), dim=-1)

    assert torch.autograd.gradcheck(logits, tuple(p.detach().requires_grad_() for p in shared.parameters()))


class Run(torch.nn.Module):
    def __init__(self, layers, shared):
        super().__init__()
        self.layers, self.shared = layers, shared

    def forward(self, inputs):
        return run(self.layers, self.shared, inputs)


@pytest.mark.parametrize("name", RECURRENT)
def test_without_sharing_nothing_changes(name):
    """Names and draws of a layer and of the cell, with the options and without."""
    results = []
    for options in ({}, {SHARE_PROJECTOR: "layer", SHARE_HEAD: "layer"}):
        torch.manual_seed(3)
        config = RoutingConfig(H, E, {STATE_SIZE: P, **options}, LAYERS)
        kind = get_router_type(name)
        results.append(kind.build_layer(config).state_dict() | kind.build_shared(config).state_dict())
    first, second = results
    assert list(first) == list(second) == ["projector", "router", "weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_cell_is_drawn_as_without_sharing_and_blocks_differ():
    cells = []
    for share in ("layer", "2"):
        torch.manual_seed(3)
        cells.append(get_router_type("gru").build_shared(config_of(share, share)))
    plain, shared = cells
    assert all(torch.equal(value, shared.state_dict()[key]) for key, value in plain.state_dict().items())
    for blocks, inputs in ((shared.projectors, H), (shared.heads, P)):
        assert len(blocks) == 3
        for one, other in itertools.combinations(blocks, 2):
            assert not torch.equal(one.weight, other.weight)
        assert all(block.weight.std() > 0.2 and block.weight.shape[1] == inputs for block in blocks)


@pytest.mark.parametrize("first", [SHARE_PROJECTOR, SHARE_HEAD])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "must be layer, all or a whole number of at least 1, got 0"),
        ("-1", "must be layer, all or a whole number of at least 1, got -1"),
        ("02", "must be layer, all or a whole number of at least 1, got 02"),
        ("2.0", "must be layer, all or a whole number of at least 1, got 2.0"),
        ("", "must be layer, all or a whole number of at least 1, got "),
        ("ALL", "must be layer, all or a whole number of at least 1, got ALL"),
        ("two", "must be layer, all or a whole number of at least 1, got two"),
        ("٢", "must be layer, all or a whole number of at least 1, got ٢"),
        (True, "must be a word, got True"),
        (2.0, "must be a word, got 2.0"),
        (0, "must be layer, all or a whole number of at least 1, got 0"),
    ],
)
def test_odd_values(first, value, said):
    with pytest.raises(ValueError) as caught:
        RoutingConfig(H, E, {first: value}, LAYERS)
    assert str(caught.value) == f"{first.dest} {said}"


def test_blocks_must_fit_the_model():
    with pytest.raises(ValueError, match="--moe-router-share-head 6: the model has 5 layers, use all"):
        get_router_type("gru").check(config_of(head="6"))
    assert config_of(head=5)[SHARE_HEAD] == "5"  # a number will do in Python
    config = RoutingConfig(H, E, {SHARE_PROJECTOR: "2"}, 6, moe_layers=frozenset({0, 4, 5}))
    with pytest.raises(ValueError, match="projector 2: the block of layers 3 to 4 has no layer with experts, which"):
        get_router_type("rnn").check(config)
    get_router_type("rnn").check(RoutingConfig(H, E, {SHARE_PROJECTOR: "4"}, 6, moe_layers=frozenset({3, 5})))


@pytest.mark.parametrize(
    ("projector", "head", "layers", "further"),
    [
        ("layer", "layer", set(), [0]),
        ("layer", "layer", {3}, []),
        ("all", "all", set(), [0]),
        ("all", "all", {4}, []),
        ("2", "layer", {2, 3}, [0, 4]),
        ("3", "layer", {2}, [3]),
        ("2", "3", {2}, [0, 4]),  # 4 is also of the second block of heads
        ("2", "all", set(), [0, 2, 4]),
        ("all", "2", {0, 4}, [2]),
    ],
)
def test_which_layers_use_what_others_do_not(projector, head, layers, further):
    _, shared = built("gru", config_of(projector, head))
    assert shared.unused_by(layers) == further
    seen = set()
    for module in (blocks for blocks in (shared.projectors, shared.heads) if blocks is not None):
        seen |= {id(module.of(index)) for index in {*layers, *further}}
        assert {id(block) for block in module} <= seen


@pytest.mark.parametrize(
    ("projector", "head", "shared", "own"), [("2", "all", 3 * H * P + E * P, 0), ("all", "layer", H * P, E * P)]
)
def test_the_planner_counts_blocks(projector, head, shared, own):
    config = RoutingConfig(H, E, {STATE_SIZE: P, SHARE_PROJECTOR: projector, SHARE_HEAD: head}, LAYERS)
    plain = RoutingConfig(H, E, {STATE_SIZE: P}, LAYERS)
    cost, without = (measure(get_router_type("gru"), c, 2, 4) for c in (config, plain))
    assert (cost.shared, cost.layer) == (6 * P * P + 6 * P + shared, own)
    assert cost.forward == without.forward and cost.forward.token == 2 * (H * P + 6 * P * P + E * P)
    assert cost.kept == without.kept and cost.state_size == P
