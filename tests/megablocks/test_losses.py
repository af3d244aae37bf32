"""The returned losses where MegaBlocks' global lists go wrong: recompute, accumulation, several forwards, eval."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rmoe_megablocks import megablocks as rmoe
from rmoe_megablocks.megablocks import losses
from tests.megablocks.test_recurrent_layers import EXPERTS, HIDDEN, LAYERS, arguments, layers_of

from megablocks import dMoE  # isort: skip
from megablocks.layers import moe, router  # isort: skip

WEIGHTS = {"moe_loss_weight": 0.5, "moe_zloss_weight": 0.2}


@pytest.fixture(autouse=True)
def lists_stay_empty():
    yield
    assert moe.get_load_balancing_loss() == router._ROUTER_LOGITS == []


def model():
    return layers_of(arguments(**WEIGHTS))


def forward(x, layers, call=lambda layer, *args: layer(*args)):
    state, total = None, torch.zeros(())
    for layer in layers:
        out, state, aux_loss = call(layer, x, state)
        x, total = x + out, total + aux_loss
    return x, total


def gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    # a sum of losses leaves the last layer's experts out
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randn(6, 2, HIDDEN, requires_grad=True)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_equal_what_upstream_computes_from_its_lists():
    torch.manual_seed(0)
    args = arguments(**WEIGHTS)
    logits = [torch.randn(20, EXPERTS) for _ in range(LAYERS)]
    total = z = 0.0
    for layer in logits:
        scores = layer.softmax(-1)
        counts = scores.topk(2).indices.flatten().bincount(minlength=EXPERTS)
        moe.save_load_balancing_loss((counts, scores))
        router._save_router_logits(layer, args)
        total = total + losses.load_balancing_loss(scores, counts, 2) * args.moe_loss_weight / LAYERS
        z = z + losses.router_z_loss(layer) * args.moe_zloss_weight
    torch.testing.assert_close(total, moe.batched_load_balancing_loss(args))
    torch.testing.assert_close(z, router.batched_router_zloss(args).sum())
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


def test_balanced_is_one_and_no_tokens_is_zero():
    scores = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    assert losses.load_balancing_loss(scores, torch.full((EXPERTS,), 2), 2).item() == pytest.approx(1)
    assert losses.load_balancing_loss(scores[:0], torch.zeros(EXPERTS), 2) == 0
    assert losses.router_z_loss(scores[:0]) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_keeps_value_and_gradient(reentrant):
    layers, cell = model()
    out, aux_loss = forward(batch(), layers)
    assert aux_loss > 0
    expected = gradients(aux_loss, layers, cell)

    def recomputed(layer, *args):
        return checkpoint(layer, *args, use_reentrant=reentrant)

    again, aux_again = forward(batch(), layers, recomputed)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(aux_again, aux_loss)
    for module in (layers, cell):  # reentrant recompute knows backward() only
        module.zero_grad()
    aux_again.backward()
    parameters = [*layers.parameters(), *cell.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    assert_equal(grads, expected)
    assert layers[0].router.routing_layer.projector.grad.abs().max() > 0


def test_accumulation_averages_it_with_the_loss():
    layers, cell = model()
    total = [0] * len(gradients(forward(batch(), layers)[1], layers, cell))
    for seed in (1, 2):
        out, aux_loss = forward(batch(seed), layers)
        grads = gradients((out.square().mean() + aux_loss) / 2, layers, cell)
        total = [a + b for a, b in zip(total, grads, strict=True)]
    whole = sum(out.square().mean() + aux for out, aux in (forward(batch(seed), layers) for seed in (1, 2))) / 2
    assert_equal(total, gradients(whole, layers, cell))


def test_several_forwards_before_a_loss_do_not_mix():
    layers, cell = model()
    alone = gradients(forward(batch(1), layers)[1], layers, cell)
    first, _second = forward(batch(1), layers)[1], forward(batch(2), layers)[1]
    assert_equal(gradients(first, layers, cell), alone)


def test_eval_and_no_grad_leave_nothing_behind():
    layers, cell = model()
    expected = gradients(forward(batch(), layers)[1], layers, cell)
    with torch.no_grad():
        assert forward(batch(2), layers)[1] > 0  # a value to log
    layers.eval()
    out, aux_loss = forward(batch(2), layers)
    assert aux_loss == 0 and not aux_loss.requires_grad
    layers.train()
    assert_equal(gradients(forward(batch(), layers)[1], layers, cell), expected)
    assert all(layer.router.slot.empty and layer.router._aux_loss is None for layer in layers)


def test_weights_of_zero_cost_nothing():
    layers, _ = layers_of(arguments(moe_loss_weight=0, moe_zloss_weight=0))
    out, aux_loss = forward(batch(), layers)
    assert aux_loss == 0 and not aux_loss.requires_grad


def test_the_stack_sums_them():
    stack = rmoe.RecurrentStack([dMoE(arguments(**WEIGHTS)) for _ in range(LAYERS)])
    x, state, total = batch(), None, 0.0
    out, aux_loss = stack(x)
    for layer in stack.layers:
        x, state, aux_i = layer(x, state)
        total = total + aux_i
    assert torch.equal(out, x) and torch.equal(aux_loss, total)
