"""A Megatron host that runs the router more or less often than once for a state: an error, never other logits."""

import pytest
import torch

from rmoe_megablocks.routing import RoutingStateError
from tests.distributed.arguments import FULL_RECOMPUTE, MOE_RECOMPUTE, selective
from tests.megatron.recurrence.test_model import B, S, batch, build, forward, gradients, routers

MODES = [[], FULL_RECOMPUTE, MOE_RECOMPUTE, selective("layernorm"), ["--mtp-num-layers", "1"]]


@pytest.fixture(scope="module")
def model(one_process):
    return build()


class Prefill:
    """Of an inference context, what the layer asks for."""

    def is_decode_only(self):
        return False


def chunked(model, monkeypatch, name):
    monkeypatch.setattr(model.config, name, 2)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(mode) or "plain")
def test_a_chunked_mlp_raises_in_training(one_process, monkeypatch, mode):
    """Megatron would call the MoE layer once a chunk: the second one would continue the first one's state."""
    model = build(*mode)
    chunked(model, monkeypatch, "mlp_chunks_for_training")
    with pytest.raises(RoutingStateError, match="ran twice for one routing state.*--mlp-chunks-for-training"):
        forward(model, 1)
    assert all(router.slot.empty for router in routers(model))
    monkeypatch.undo()
    assert forward(model, 1).isfinite().all()


def test_a_chunked_prefill_raises(model, monkeypatch):
    chunked(model, monkeypatch, "mlp_chunks_for_prefill")
    model.eval()
    layer = model.decoder.layers[0]
    layer.mlp.router.slot.put(None)
    with pytest.raises(RoutingStateError, match="ran twice.*--mlp-chunks-for-prefill"), torch.no_grad():
        with layer.mlp.router.slot.call():
            layer._forward_mlp(torch.randn(S, B, 48), Prefill())
    model.train()


@pytest.mark.parametrize("training", [True, False])
def test_early_tokens_do_not_depend_on_later_ones(model, training):
    """What chunks would break, in numbers: logits of the first half, with another second half."""
    model.train(training)
    tokens, positions, _ = batch(1)
    changed = tokens.clone()
    changed[:, S // 2 :] = (changed[:, S // 2 :] + 1) % 256
    with torch.no_grad():
        logits, others = model(tokens, positions, None), model(changed, positions, None)
    model.train()
    torch.testing.assert_close(logits[:, : S // 2], others[:, : S // 2], rtol=1e-5, atol=1e-5)
    assert (logits - others)[:, S // 2 :].abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES[1:4], ids=" ".join)
def test_recompute_runs_the_router_again_and_is_right(one_process, mode):
    model, recomputing = build(), build(*mode)
    recomputing.load_state_dict(model.state_dict())
    calls = []
    for router in routers(recomputing):
        router.routing_layer.register_forward_hook(lambda *args: calls.append(1))
    expected, found = gradients(model), gradients(recomputing)
    assert len(calls) == (4 if mode == MODES[3] else 8)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert all(router.slot.empty for router in routers(recomputing))


def test_a_router_that_its_layer_did_not_call(model):
    layer = model.decoder.layers[1]
    for training in (True, False):
        model.train(training)
        with pytest.raises(RoutingStateError, match="only the layer around an MoE layer may call it"):
            layer.mlp(torch.randn(S, B, 48))
    model.train()
    with pytest.raises(RoutingStateError, match="read, but no state was handed in"):
        _ = layer.mlp.router.state


def test_a_layer_whose_router_does_not_run(model, monkeypatch):
    layer = model.decoder.layers[1]
    monkeypatch.setattr(layer, "_forward_mlp", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(RoutingStateError, match="fetched, but the router has not run"):
        forward(model, 1)


def test_micro_batches_that_overlap_in_a_layer(model, monkeypatch):
    layer = model.decoder.layers[1]
    original = layer._forward_mlp

    def interleaved(*args, **kwargs):
        monkeypatch.setattr(layer, "_forward_mlp", original)
        forward(model, 2)
        return original(*args, **kwargs)

    monkeypatch.setattr(layer, "_forward_mlp", interleaved)
    with pytest.raises(RoutingStateError, match="two forward passes of a layer must not overlap"):
        forward(model, 1)
    assert all(router.slot.empty for router in routers(model))


def test_an_interrupted_forward_leaves_no_state(model, monkeypatch):
    expected = forward(model, 1)
    layer = model.decoder.layers[2]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.mlp, "dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        forward(model, 2)
    monkeypatch.undo()
    assert torch.equal(forward(model, 1), expected)


def test_a_state_of_other_tokens(model):
    layer = model.decoder.layers[1]
    hidden, rotary = torch.randn(S, B, 48), None
    for shape, reason in (((S, B - 1, 16), "of shape"), ((S, B, 15), "of shape")):
        with pytest.raises(ValueError, match=f"the routing state must be None or {reason}"):
            layer(hidden, attention_mask=None, rotary_pos_emb=rotary, context=torch.zeros(shape))
    with pytest.raises(ValueError, match="of dtype torch.float32, got torch.bfloat16"):
        layer(hidden, attention_mask=None, rotary_pos_emb=rotary, context=torch.zeros(S, B, 16).bfloat16())
    assert layer.mlp.router.slot.empty
