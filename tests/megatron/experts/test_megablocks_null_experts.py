"""Null experts with MegaBlocks' experts: what Megatron's compute, of as many rows as are chosen."""

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from rmoe_megablocks.megatron.experts.megablocks_weights import from_megatron
from tests.distributed.arguments import FULL_RECOMPUTE, of_type
from tests.megatron.recurrence.test_model import build, forward
from tests.megatron.test_null_experts import NULL, SHARED

MEGABLOCKS = ["--moe-backend", "megablocks"]


def both(*argv: str):
    """A model with Megatron's experts, and the same with MegaBlocks'."""
    theirs, ours = build(*NULL, *argv), build(*NULL, *MEGABLOCKS, *argv)
    ours.load_state_dict(from_megatron(theirs.state_dict(), gated=True), strict=False)
    return theirs, ours


class Rows:
    """The map of a layer's router, the rows that its experts compute, and what comes of them."""

    def __init__(self, layer: MoELayer) -> None:
        layer.router.register_forward_hook(lambda router, args, output: setattr(self, "map_TE", output[1]))
        layer.experts.dropless.mlp.register_forward_pre_hook(self._experts)
        layer.register_forward_hook(lambda layer, args, output: setattr(self, "y_TH", output[0].flatten(0, 1)))

    def _experts(self, mlp, args):
        self.rows, self.of_expert = len(args[0]), args[1].tolist()


def watched(model) -> list[Rows]:
    return [Rows(module) for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("name", ["gru", "linear"])
@pytest.mark.parametrize("more", [[], SHARED, FULL_RECOMPUTE], ids=["routed", "shared", "full recompute"])
def test_the_same_as_megatrons_experts(one_process, name, more):
    theirs, ours = both(*of_type(name), *more)
    seen = watched(ours)
    expected, found = (forward(model, 1) for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for loss in (expected, found):
        loss.mean().backward()
    numbers = set()
    for layer in seen:
        assert layer.of_expert == layer.map_TE.sum(0).tolist() and layer.rows == layer.map_TE.sum()
        counts = layer.map_TE.sum(-1)
        if more is not SHARED:
            assert not layer.y_TH[counts == 0].any() and layer.y_TH[counts > 0].any(-1).all()
        numbers |= set(counts.tolist())
    assert numbers == {0, 1, 2}
    gradients = from_megatron({name: p.grad for name, p in theirs.named_parameters()}, gated=True)
    for parameter_name, parameter in ours.named_parameters():
        expected = gradients[parameter_name]
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9, parameter_name


def test_a_layer_whose_tokens_all_choose_null_experts(one_process):
    """No row at all: zeros, and gradients that are zeros, not NaN."""
    model = build(*NULL, *MEGABLOCKS, *of_type("linear"))
    layer = [module for module in model.modules() if isinstance(module, MoELayer)][2]
    seen = Rows(layer)
    layer.router.register_forward_pre_hook(lambda router, args: (args[0].abs(),))
    with torch.no_grad():
        layer.router.weight[:4].fill_(-1.0)
        layer.router.weight[4:].fill_(1.0)
    forward(model, 1).mean().backward()
    assert seen.rows == 0 and not seen.y_TH.any()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.experts.parameters())
    assert layer.router.weight.grad.any()
