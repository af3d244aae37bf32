"""--moe-router-impl in MegaBlocks' layers, as an entry of ``moe_router_options``."""

import pytest
import torch

from tests.megablocks.test_recurrent_layers import HIDDEN, arguments, forward, layers_of


def run(impl: str) -> list[torch.Tensor]:
    layers, cell = layers_of(arguments(moe_router_options={"moe_router_impl": impl}))
    torch.manual_seed(1)
    x = torch.randn(3, 5, HIDDEN, requires_grad=True)
    results = forward(x, layers)
    loss = sum(value.square().sum() for value in results if torch.is_tensor(value))
    return [loss, *torch.autograd.grad(loss, [x, *cell.parameters()])]


def test_recompute_equals_eager():
    for ours, theirs in zip(run("recompute"), run("eager"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_triton_is_refused_by_name():
    with pytest.raises(ValueError, match="--moe-router-impl triton: it needs a CUDA GPU, and runs on cpu; use auto"):
        run("triton")
