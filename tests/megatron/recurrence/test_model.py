"""The router inside a Megatron model of one process: what reaches it, what it keeps, what leaves it."""

import json
import types

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.router_trace import RouterTracer
from megatron.training.argument_utils import gpt_config_from_args

from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.recurrence import stage_boundary
from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.megatron.recurrence.layer import RecurrentTransformerLayer
from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter
from rmoe_megablocks.routing import reference
from tests.distributed.arguments import BASE, FULL_RECOMPUTE, MOE_RECOMPUTE, of_type, selective

S, B, VOCABULARY = 32, 2, 256


def build(*argv: str, **unchecked):
    """The model of these arguments, and of what our entry refuses and a script of one's own may set."""
    args = arguments.parse([*BASE, "--eval-interval", "100", *argv])
    arguments.fill_defaults(args)
    arguments.validate(args)
    vars(args).update(unchecked)
    args.padded_vocab_size = VOCABULARY
    model_config = gpt_config_from_args(args)
    install_router(model_config, args)
    builder = model_config.get_builder_cls()(model_config)
    torch.manual_seed(1234)
    (model,) = builder.build_distributed_models(ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False)
    return model


def batch(seed: int):
    tokens = torch.randint(VOCABULARY, (B, S + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], torch.arange(S).expand(B, S), tokens[:, 1:]


def forward(model, seed: int) -> torch.Tensor:
    tokens, positions, labels = batch(seed)
    return model(tokens, positions, None, labels=labels)


@pytest.fixture(scope="module")
def model(one_process):
    return build()


def routers(model) -> list[RecurrentTopKRouter]:
    return [module for module in model.modules() if isinstance(module, RecurrentTopKRouter)]


def test_linear_is_megatrons_own_model(one_process):
    model = build(*of_type("linear"))
    kinds = {type(module) for module in model.modules()}
    assert TopKRouter in kinds and not {RecurrentTopKRouter, RecurrentTransformerLayer} & kinds
    assert not hasattr(model.config, "has_cond_embedder") and not hasattr(model, "rnn_router")


def test_parameters(model):
    names = dict(model.named_parameters())
    shared = [name for name in names if name.startswith("rnn_router.")]
    assert len(shared) == 4 and len(routers(model)) == 4
    assert names["decoder.layers.0.mlp.router.routing_layer.projector"].shape == (16, 48)
    assert names["decoder.layers.0.mlp.router.routing_layer.router"].shape == (4, 16)
    assert not any(name.endswith(("router.weight", "router.bias")) for name in names)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_all_layers_are_the_equations(one_process, bias):
    model = build(*["--moe-router-rnn-bias"] * bias)
    seen = []
    for router in routers(model):
        router.routing_layer.register_forward_hook(
            lambda module, args, output: seen.append((module, args[0].flatten(0, 1), output[0].flatten(0, 1)))
        )
    forward(model, 1)
    cell = model.rnn_router.cell
    logits, _ = reference.layerwise_logits(
        [x for _, x, _ in seen],
        [(layer.projector, layer.projector_bias) for layer, _, _ in seen],
        (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh),
        [(layer.router, layer.router_bias) for layer, _, _ in seen],
    )
    assert len(logits) == 4
    for expected, (_, _, ours) in zip(logits, seen, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_no_state_outlives_a_forward(model):
    first = forward(model, 1)
    forward(model, 2)
    assert torch.equal(forward(model, 1), first)
    assert all(router.slot.empty for router in routers(model))


def test_train_and_eval_do_not_touch_each_other(model):
    trained = forward(model, 1)
    model.eval()
    with torch.no_grad():
        evaluated = forward(model, 1)
        forward(model, 3)
    model.train()
    assert torch.equal(evaluated, trained)  # no dropout in this configuration
    assert torch.equal(forward(model, 1), trained)


def test_sequences_of_a_micro_batch_do_not_touch_each_other(model):
    tokens, positions, labels = batch(1)
    together = model(tokens, positions, None, labels=labels)
    swapped = model(tokens.flip(0), positions, None, labels=labels.flip(0))
    torch.testing.assert_close(swapped.flip(0), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "state", "pipeline"),
    [
        (torch.float32, torch.float32, "float32"),
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
        (torch.bfloat16, torch.float64, "bfloat16"),
        (torch.float32, torch.bfloat16, "float32"),
    ],
)
def test_a_message_carries_every_bit_both_ways(hidden, state, pipeline):
    class Config:
        hidden_size, router_state_size, params_dtype = 12, 4, hidden
        moe_router_dtype = {torch.float32: "fp32", torch.float64: "fp64"}.get(state)
        pipeline_dtype = getattr(torch, pipeline)

    if state == torch.bfloat16:
        Config.params_dtype = torch.bfloat16
    x = torch.randn(3, 2, 12).to(hidden).requires_grad_()
    h = torch.randn(3, 2, 4, dtype=torch.float64).to(state).requires_grad_()
    message = stage_boundary.pack(x, h, Config)
    assert message.shape[-1] == 12 + stage_boundary.wire_width(Config) and message.dtype == Config.pipeline_dtype
    received = message.detach().requires_grad_()
    x_there, h_there = stage_boundary.unpack(received, Config)
    assert torch.equal(x_there, x) and torch.equal(h_there, h) and h_there.dtype == state
    grad_x, grad_h = torch.randn_like(x_there), torch.randn_like(h_there)
    torch.autograd.backward((x_there, h_there), (grad_x, grad_h))
    message.backward(received.grad)
    assert torch.equal(x.grad, grad_x) and torch.equal(h.grad, grad_h)


def test_a_stage_of_dense_layers_sends_a_zero_state():
    class Config:
        hidden_size, router_state_size, params_dtype, moe_router_dtype = 12, 4, torch.float32, None
        pipeline_dtype = torch.float32

    x_there, h_there = stage_boundary.unpack(stage_boundary.pack(torch.randn(3, 2, 12), None, Config), Config)
    assert h_there.shape == (3, 2, 4) and not h_there.any()


def test_multi_token_prediction_routes_recurrently_from_no_state(one_process):
    model = build("--mtp-num-layers", "2")
    mtp = [router for router in routers(model) if router.is_mtp_layer]
    assert len(mtp) == 2 and len(routers(model)) == 6
    assert not any(type(module) is TopKRouter for module in model.modules())
    states = []
    for router in mtp:
        assert router._shared == routers(model)[0]._shared
        router.routing_layer.register_forward_hook(lambda module, args, output: states.append(args[1]))
    forward(model, 1)
    assert states == [None, None]


def test_packed_micro_batches_give_the_state_the_shape_of_the_hidden_states(model):
    """[B*S, 1, H], sample after sample, is routed as [S, B, H] (upstream's tokens_per_sample)."""
    layer, packed = model.decoder.layers[0], types.SimpleNamespace(tokens_per_sample=S)
    hidden = torch.randn(B * S, 1, 48)
    state = hidden[..., :16].clone()  # recognisable: the first columns of its token
    slot = layer.mlp.router.slot
    slot.put(state)
    unpacked, _, micro_batch_size = layer._maybe_unflatten_for_moe(hidden, None, packed)
    assert unpacked.shape == (S, B, 48)
    slot.step(lambda there: (None, there))  # the router would see this state, and hands it on as it is
    assert torch.equal(slot.state, unpacked[..., :16])
    packed_again = layer._maybe_reflatten_from_moe(unpacked, packed, micro_batch_size)
    assert torch.equal(packed_again, hidden) and torch.equal(slot.take(), state)


def test_a_first_layer_of_packed_micro_batches_has_no_state_to_reshape(model):
    layer, packed = model.decoder.layers[0], types.SimpleNamespace(tokens_per_sample=S)
    layer.mlp.router.slot.put(None)
    layer._maybe_unflatten_for_moe(torch.randn(B * S, 1, 48), None, packed)
    assert layer.mlp.router.slot.withdraw() is None


def gradients(model, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens, positions, labels = batch(1)
    model(tokens, positions, None, labels=labels, **kwargs).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


PADDING = torch.arange(S).expand(B, S) >= S - 8  # True: left out of balancing


@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, MOE_RECOMPUTE, selective("layernorm")])
def test_a_padding_mask_reaches_the_router_through_recompute(one_process, recompute):
    model, recomputing = build(), build(*recompute)
    recomputing.load_state_dict(model.state_dict())
    expected, unmasked = gradients(model, padding_mask=PADDING), gradients(model)
    found = gradients(recomputing, padding_mask=PADDING)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    router = "decoder.layers.3.mlp.router.routing_layer.router"
    assert (unmasked[router] - expected[router]).norm() > 1e-3 * expected[router].norm()


def test_router_replay_repeats_another_pass_choices(one_process):
    RouterReplay.clear_global_router_replay_instances()
    model = build(moe_enable_routing_replay=True)
    chosen: list[torch.Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: chosen.append(output[1].clone()))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    forward(model, 1)
    first, chosen[:] = list(chosen), []
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    RouterReplay.clear_global_router_replay_action()
    forward(model, 1)
    free, chosen[:] = list(chosen), []
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    forward(model, 1)
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_router_replay_instances()
    assert len(first) == 4 and not all(torch.equal(ours, theirs) for ours, theirs in zip(free, first, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(chosen, first, strict=True))


def test_router_trace_sees_every_layer_and_disturbs_none(model, tmp_path):
    tokens, positions, labels = batch(1)
    plain = model(tokens, positions, None, labels=labels)
    tracer = RouterTracer(str(tmp_path), max_steps=5, rank=0, training_mode=True, capture_hidden_states=True)
    tracer.register_hooks([model])
    traced = model(tokens, positions, None, labels=labels)
    tracer.remove_hooks()
    tracer.flush()
    records = [json.loads(line) for line in (tmp_path / "router_trace_rank0.jsonl").read_text().splitlines()]
    assert torch.equal(traced, plain) and len(records) == 4
    assert all(router.slot.empty for router in routers(model))
