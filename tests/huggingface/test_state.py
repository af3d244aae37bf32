"""What no common test of the library sees: the state's way from layer to layer, forward, backward and recomputed."""

import pytest
import torch

from rmoe_megablocks.huggingface import modeling
from rmoe_megablocks.routing import RECURRENCE
from tests.huggingface.built import gradients, having, model, tokens

STATEFUL = having(RECURRENCE)


@pytest.mark.parametrize("name", STATEFUL)
def test_the_order_of_routers_matters(name):
    """Only through the state: two layers exchange nothing but what they own of the router, whose matrices are alike."""
    made = model(name, moe_layer_freq=[1] * 5)
    before = made(tokens()).logits
    layers = made.model.layers
    first, second = layers[1], layers[2]
    second.load_state_dict(first.state_dict())
    alike = made(tokens(), output_router_logits=True).router_logits
    assert (alike[1] - alike[2]).abs().max() > 1e-3  # the same weights, another state and input
    made.model.layers = torch.nn.ModuleList([layers[0], *layers[3:], *layers[1:3]])
    assert (made(tokens()).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", STATEFUL)
def test_logits_depend_on_the_state(name, monkeypatch):
    made = model(name)
    before = made(tokens()).logits
    _change_state(monkeypatch, lambda h: None)
    assert (made(tokens()).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", STATEFUL)
def test_detaching_the_state_changes_gradients(name, monkeypatch):
    made = model(name).train()
    whole = gradients(made, output_router_logits=True)
    _change_state(monkeypatch, lambda h: None if h is None else h.detach())
    cut = gradients(made, output_router_logits=True)
    changed = [n for n in whole if (whole[n] - cut[n]).abs().max() > 1e-5]
    assert len(changed) > 10 and any(".layers.1.mlp.router." in n for n in changed)
    monkeypatch.undo()
    declared = model(name, {RECURRENCE: "detach"}).train()
    declared.load_state_dict(made.state_dict())
    for n, gradient in gradients(declared, output_router_logits=True).items():
        torch.testing.assert_close(gradient, cut[n], rtol=0, atol=1e-6, msg=n)


def _change_state(monkeypatch, change) -> None:
    """What a layer gets as the previous one's state, by ``change``."""
    original = modeling.RmoeSparseMoeBlock.forward
    monkeypatch.setattr(
        modeling.RmoeSparseMoeBlock, "forward", lambda self, x, h, shared: original(self, x, change(h), shared)
    )


@pytest.mark.parametrize("reentrant, aux_loss", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name", STATEFUL)
def test_recomputed_gradients_equal_those_that_were_kept(name, reentrant, aux_loss):
    made = model(name, router_aux_loss_coef=1.0).train()
    kept = gradients(made, output_router_logits=aux_loss)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in made.model.layers)
    calls = []
    made.model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    recomputed = gradients(made, output_router_logits=aux_loss)
    assert len(calls) == 2 and recomputed.keys() == kept.keys()
    for n in kept:
        torch.testing.assert_close(recomputed[n], kept[n], rtol=0, atol=1e-6, msg=n)


def test_the_auxiliary_loss_has_a_gradient_of_its_own():
    made = model("gru", router_aux_loss_coef=1.0).train()
    without, with_it = gradients(made), gradients(made, output_router_logits=True)
    shared = "model.shared_router.weight_hh"
    assert (without[shared] - with_it[shared]).abs().max() > 1e-3


@pytest.mark.parametrize("keywords", [{"use_reentrant": True}, {"preserve_rng_state": True}])
def test_reentrant_recomputation_with_an_auxiliary_loss_is_refused(keywords):
    made = model("gru").train()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    with pytest.raises(ValueError, match='set gradient_checkpointing_kwargs={"use_reentrant": False}'):
        made(tokens(), labels=tokens(), output_router_logits=True)
    with torch.no_grad():
        made(tokens(), output_router_logits=True)  # nothing is trained by it
    made.eval()(tokens(), output_router_logits=True)
    made.train().config.output_router_logits = True
    with pytest.raises(ValueError, match="reentrant"):
        made(tokens(), labels=tokens())


def test_a_state_of_the_wrong_width_is_told():
    made = model("gru")
    layer = made.model.layers[1]
    x = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="routing state"):
        layer.mlp(x, torch.zeros(1, 3, 7), made.model.shared_router)
