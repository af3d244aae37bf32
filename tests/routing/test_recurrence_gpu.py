"""The recurrence on a GPU against the equations in float64 on the CPU, outputs and every gradient."""

import pytest
import torch

from rmoe_megablocks.routing import reference
from tests.routing.built import config_of, layer_of, shared_of

pytestmark = pytest.mark.gpu
T, H, P, E, LAYERS = 512, 256, 128, 16, 3


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_layers_in_fp32_equal_the_equations(hidden_dtype):
    torch.manual_seed(0)
    config = config_of(H, E, P, bias=True, init_method=lambda w: torch.nn.init.normal_(w, std=0.1))
    layers = [layer_of(config).cuda() for _ in range(LAYERS)]
    cell = shared_of(config).cuda()
    inputs = [torch.randn(T, H, device="cuda").to(hidden_dtype) for _ in range(LAYERS)]
    weights = [torch.randn(T, E, device="cuda") for _ in range(LAYERS)]
    parameters = [p for module in (*layers, cell) for p in module.parameters()]

    h, loss = None, 0.0
    for layer, x, weight in zip(layers, inputs, weights, strict=True):
        logits, h = layer(x, h, cell, torch.float32)
        loss = loss + (weight * logits).sum()
    ours = torch.autograd.grad(loss, parameters)

    doubles = {p: p.detach().double().cpu().requires_grad_() for p in parameters}
    logits, _ = reference.layerwise_logits(
        [x.double().cpu() for x in inputs],
        [(doubles[layer.projector], doubles[layer.projector_bias]) for layer in layers],
        tuple(doubles[p] for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)),
        [(doubles[layer.router], doubles[layer.router_bias]) for layer in layers],
    )
    expected = sum((w.double().cpu() * x).sum() for w, x in zip(weights, logits, strict=True))
    theirs = torch.autograd.grad(expected, list(doubles.values()))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.double().cpu() - other).norm() <= 1e-3 * other.norm()
