"""The router inside a Megatron model of one process: what reaches it, what it keeps, what leaves it."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training.argument_utils import gpt_config_from_args

from rmoe_megablocks.megatron import arguments, stage_boundary
from rmoe_megablocks.megatron.install import install_router
from rmoe_megablocks.megatron.layer import RecurrentTransformerLayer
from rmoe_megablocks.megatron.router import RecurrentTopKRouter
from rmoe_megablocks.routing import reference
from tests.distributed.arguments import BASE

S, B, VOCABULARY = 32, 2, 256


def build(*argv: str):
    args = arguments.parse([*BASE, "--eval-interval", "100", *argv])
    arguments.fill_defaults(args)
    arguments.validate(args)
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
    model = build("--moe-router-type", "linear")
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
    assert all(router._state == [] for router in routers(model))


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
