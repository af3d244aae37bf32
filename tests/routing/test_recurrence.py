"""The recurrence against the equations, torch's own cell and finite differences."""

import itertools

import pytest
import torch

from rmoe_megablocks.kernels import gru_step, linear_in_dtype
from rmoe_megablocks.routing import RouterLayer, reference
from tests.routing.built import config_of, layer_of, shared_of

T, H, P, E, LAYERS = 7, 12, 5, 4, 3
DOUBLE = torch.float64


def stack(bias: bool, seed: int = 0) -> tuple[list[RouterLayer], torch.nn.Module]:
    """Layers and shared cell in float64 with weights large enough to saturate nothing and hide nothing."""
    torch.manual_seed(seed)
    config = config_of(H, E, P, bias=bias, init_method=lambda w: torch.nn.init.normal_(w, std=0.5))
    layers = [layer_of(config).to(DOUBLE) for _ in range(LAYERS)]
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter)
    return layers, shared_of(config).to(DOUBLE)


def run(layers, cell, inputs):
    h, logits, states = None, [], []
    for layer, x in zip(layers, inputs, strict=True):
        logits_i, h = layer(x, h, cell)
        logits.append(logits_i)
        states.append(h)
    return logits, states


def reference_run(layers, cell, inputs):
    return reference.layerwise_logits(
        inputs,
        [(layer.projector, layer.projector_bias) for layer in layers],
        (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh),
        [(layer.router, layer.router_bias) for layer in layers],
    )


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_every_gradient_equal_the_equations(bias):
    layers, cell = stack(bias)
    inputs = [torch.randn(T, H, dtype=DOUBLE, requires_grad=True) for _ in range(LAYERS)]
    leaves = [*inputs, *cell.parameters(), *itertools.chain(*(layer.parameters() for layer in layers))]
    weights = [torch.randn(T, E, dtype=DOUBLE) for _ in range(LAYERS)]
    results = []
    for forward in (run, reference_run):
        logits, states = forward(layers, cell, inputs)
        loss = sum((w * torch.softmax(x, -1)).sum() for w, x in zip(weights, logits, strict=True))
        results.append([*logits, *states, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_cell_equals_torch_gru_cell():
    _, cell = stack(bias=False)
    theirs = torch.nn.GRUCell(P, P, dtype=DOUBLE)
    theirs.load_state_dict(cell.state_dict())
    x, h = torch.randn(T, P, dtype=DOUBLE), torch.randn(T, P, dtype=DOUBLE)
    torch.testing.assert_close(cell(x, h), theirs(x, h), rtol=0, atol=1e-12)
    torch.testing.assert_close(cell(x, None), theirs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_step_passes_gradcheck(first):
    x, h, *weights = (
        torch.randn(shape, dtype=DOUBLE, requires_grad=True)
        for shape in ((2, 3, P), (2, 3, P), (3 * P, P), (3 * P, P), (3 * P,), (3 * P,))
    )
    if first:
        assert torch.autograd.gradcheck(lambda x, *w: gru_step(x, None, *w), (x, *weights))
    else:
        assert torch.autograd.gradcheck(gru_step, (x, h, *weights))


def test_first_step_reports_a_gradient_for_every_weight():
    """A stage whose only MoE layer is the model's first must not leave a gradient out: see the kernel."""
    _, cell = stack(bias=False)
    cell(torch.randn(T, P, dtype=DOUBLE, requires_grad=True), None).sum().backward()
    assert all(parameter.grad is not None for parameter in cell.parameters())
    assert cell.weight_hh.grad.abs().sum() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_linear_in_dtype_gradients(bias):
    x = torch.randn(2, 3, H, requires_grad=True)
    weight = torch.randn(P, H, requires_grad=True)
    b = torch.randn(P, requires_grad=True) if bias else None
    leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
    grad = torch.randn(2, 3, P, dtype=DOUBLE)
    ours = linear_in_dtype(x, weight, b, DOUBLE)
    theirs = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert ours.dtype == DOUBLE
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other)


def test_bf16_input_is_routed_in_fp32():
    layers, cell = stack(bias=False)
    layer, cell = layers[0].to(torch.bfloat16), cell.float()
    x = torch.randn(T, H, dtype=torch.bfloat16)
    logits, h = layer(x, None, cell, torch.float32)
    assert logits.dtype == h.dtype == torch.float32
    expected, _ = layer.float()(x.float(), None, cell)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_tokens_are_independent():
    layers, cell = stack(bias=True)
    inputs = [torch.randn(T, H, dtype=DOUBLE) for _ in range(LAYERS)]
    order = torch.randperm(T)
    logits, states = run(layers, cell, inputs)
    permuted, permuted_states = run(layers, cell, [x[order] for x in inputs])
    for a, b in zip(logits + states, permuted + permuted_states, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-14)
    changed = [x.clone() for x in inputs]
    changed[0][2] += 1
    for a, b in zip(logits, run(layers, cell, changed)[0], strict=True):
        others = torch.arange(T) != 2
        assert torch.equal(a[others], b[others]) and not torch.equal(a[2], b[2])


def test_state_of_the_previous_layer_matters():
    """Guards against a router that silently forgets: the paper's NP ablation would pass the shape tests."""
    layers, cell = stack(bias=False)
    inputs = [torch.randn(T, H, dtype=DOUBLE) for _ in range(LAYERS)]
    logits, _ = run(layers, cell, inputs)
    forgetful = [layer(x, None, cell)[0] for layer, x in zip(layers, inputs, strict=True)]
    assert torch.equal(logits[0], forgetful[0])
    assert not torch.allclose(logits[1], forgetful[1])
