"""What is counted as saved for the backward pass, to the byte."""

import weakref

import pytest
import torch
from torch import nn

from benchmarks.measuring.saved_bytes import SavedBytes
from benchmarks.routing_step.check import saved_bytes
from benchmarks.routing_step.inputs import Inputs
from benchmarks.routing_step.providers import PROVIDERS
from benchmarks.routing_step.sizes import Size

T, H, P, E = 6, 40, 16, 8


def saved(run, left_out=()) -> int:
    with SavedBytes(left_out) as found:
        result = run()
    del result
    return found.total


def test_a_linear_layer_saves_its_input():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    assert saved(lambda: layer(x), layer.parameters()) == 3 * 8 * 4
    assert saved(lambda: layer(x)) == 3 * 8 * 4 + 4 * 8 * 4
    assert saved(lambda: layer(x), [x, *layer.parameters()]) == 0


def test_a_storage_counts_once_and_a_view_as_all_of_it():
    x = torch.randn(5, 8, requires_grad=True)
    assert saved(lambda: x * x) == 5 * 8 * 4
    assert saved(lambda: x[:2].sin() + x[1:3].sin()) == 5 * 8 * 4
    assert saved(lambda: x.exp().exp()) == 2 * 5 * 8 * 4


def test_storages_that_are_freed_on_the_way_still_count():
    """A later storage at the same address is another one."""
    x = torch.randn(1000, requires_grad=True)

    def run():
        for _ in range(50):
            x.sin().sin()

    assert saved(run) == 51 * 4000


def test_nothing_is_held_afterwards():
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes() as found:
        result = x.exp()
    assert found.total == 4000
    seen = weakref.ref(result)
    del result, found
    assert seen() is None


def test_gradients_are_those_without_it():
    x = torch.randn(10, requires_grad=True)
    layer = nn.Linear(10, 10)

    def loss():
        return (layer(x).sigmoid() * x).exp().sum()

    with SavedBytes():
        ours = torch.autograd.grad(loss(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(loss(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("provider", "values"),
    [("released", 7 * P), ("naive", 7 * P), ("GRUCell", 8 * P), ("eager", 6 * P), ("recompute", 2 * P)]
    + [("projector_router", P), ("megatron_linear", 0)],
)
def test_of_a_routing_step(provider, values):
    """Without parameters, hidden states and the previous state; the new one counts."""
    size = Size("a test's", H, P, E, torch.float32, torch.float32, (T,), "cpu")
    inputs = Inputs(size, T, torch.device("cpu"))
    assert saved_bytes(PROVIDERS[provider].build(inputs, torch.float32)) == values * T * 4
