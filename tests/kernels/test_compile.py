"""torch.compile takes a stack of gru layers as one graph, with the eager numbers."""

import pytest
import torch

from rmoe_megablocks.kernels import gru_step
from rmoe_megablocks.routing import RoutingConfig, get_router_type

H, P, E, T = 20, 8, 4, 6


def stack(count: int = 3):
    torch.manual_seed(0)
    options = {"moe_router_rnn_hidden_size": P, "moe_router_rnn_bias": True, "moe_router_init": "fan_in"}
    config, gru = RoutingConfig(H, E, options), get_router_type("gru")
    layers = torch.nn.ModuleList(gru.build_layer(config) for _ in range(count))
    cell = gru.build_shared(config)
    xs = [torch.randn(2, T, H, requires_grad=True) for _ in layers]

    def run(*xs):
        h, logits = None, []
        for layer, x in zip(layers, xs, strict=True):
            logits_TE, h = layer(x, h, cell)
            logits.append(logits_TE)
        return *logits, h

    return run, xs, [*xs, *layers.parameters(), *cell.parameters()]


def values_and_gradients(run, xs, leaves):
    values = run(*xs)
    loss = sum((value * (i + 1)).square().sum() for i, value in enumerate(values))
    return [*values, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_three_layers_are_one_graph(backend):
    run, xs, leaves = stack()
    expected = values_and_gradients(run, xs, leaves)
    torch._dynamo.reset()
    found = values_and_gradients(torch.compile(run, fullgraph=True, backend=backend), xs, leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_form_with_checkpoint_and_any_number_of_rows(recompute):
    """Non-reentrant checkpoint inside the graph; a second number of rows."""

    def step(x, h, *weights):
        return torch.utils.checkpoint.checkpoint(
            lambda *inputs: gru_step(*inputs, recompute=recompute), x, h, *weights, use_reentrant=False
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((3 * P, P), (3 * P, P), (3 * P,), (3 * P,))]
    for rows in (5, 9):
        x, h = (torch.randn(rows, P, requires_grad=True) for _ in range(2))
        pairs = []
        for run in (compiled, gru_step):
            value = run(x, h, *weights)
            pairs.append([value, *torch.autograd.grad(value.square().sum(), (x, h, *weights))])
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_eager_calls_no_operation():
    """The operations take tens of microseconds of the host for each call: eagerly, the Function does."""
    with torch.profiler.profile() as profile:
        x = torch.randn(3, P, requires_grad=True)
        weights = [torch.randn(shape) for shape in ((3 * P, P), (3 * P, P), (3 * P,), (3 * P,))]
        gru_step(x, None, *weights).sum().backward()
    assert not [event.key for event in profile.key_averages() if event.key.startswith("rmoe::")]
