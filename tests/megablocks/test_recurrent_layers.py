"""dMoE and MoE with the GRU router against a dense model routed by the equations; linear against stock MegaBlocks."""

import copy
import io
import pickle

import pytest
import torch

from rmoe_megablocks import megablocks as rmoe
from rmoe_megablocks.errors import UsageError
from tests.megablocks import dense

rmoe.register()

from megablocks import Arguments as StockArguments  # noqa: E402
from megablocks import MoE, dMoE  # noqa: E402
from megablocks.layers import moe, router  # noqa: E402

HIDDEN, FEATURES, EXPERTS, LAYERS, STATE = 16, 24, 8, 3, 12
DROPLESS = {"moe_capacity_factor": 0}  # of a MoE: room for every token


def arguments(dtype=torch.float32, **changes) -> rmoe.Arguments:
    values = dict(
        hidden_size=HIDDEN,
        ffn_hidden_size=FEATURES,
        num_layers=LAYERS,
        moe_num_experts=EXPERTS,
        moe_top_k=2,
        moe_normalize_expert_weights=1,
        moe_zloss_weight=0.01,
        fp16=False,
        bf16=dtype == torch.bfloat16,
        bias=False,
        device="cpu",
        init_method=lambda w: torch.nn.init.normal_(w, std=0.4),
        output_layer_init_method=lambda w: torch.nn.init.normal_(w, std=0.4),
        moe_router_type="gru",
    )
    if "moe_router_type" not in changes:
        values["moe_router_rnn_hidden_size"] = STATE
    return rmoe.Arguments(**(values | changes))


def layers_of(args, kind=dMoE, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList(kind(args) for _ in range(LAYERS))
    cell = rmoe.share_recurrence(layers)
    for parameter in (*layers.parameters(), *cell.parameters()):
        if parameter.ndim == 1:  # biases start at 0, which would hide them
            torch.nn.init.normal_(parameter, std=0.3)
    return layers, cell


def forward(x, layers):
    state, total = None, 0.0
    for layer in layers:
        out, *bias, state, aux_loss = layer(x, router_state=state)
        x = x + out + (bias[0] if bias else 0)
        total = total + aux_loss
    return x, total


@pytest.mark.parametrize(
    "kind, changes",
    [
        (dMoE, {}),
        (dMoE, {"mlp_type": "glu", "moe_router_rnn_bias": True}),
        (dMoE, {"bias": True, "moe_top_k": 1, "moe_normalize_expert_weights": None}),
        (dMoE, {"bias": True, "return_bias": False, "moe_router_rnn_init": "init_method"}),
        (dMoE, {"moe_router_rnn_bias": True, "moe_router_init": "fan_in"}),
        (dMoE, {"memory_optimized_mlp": True, "mlp_type": "glu", "ffn_hidden_size": 20, "hidden_size": 10}),
        (MoE, DROPLESS),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__,
)
def test_outputs_and_every_gradient_equal_the_dense_reference(kind, changes):
    args = arguments(**changes)
    layers, cell = layers_of(args, kind)
    x = torch.randn(5, 3, args.hidden_size, requires_grad=True)
    leaves = [x, *layers.parameters(), *cell.parameters()]
    weight = torch.randn_like(x)
    results = []
    for run in (lambda: forward(x, layers), lambda: dense.stack_of_layers(x, layers, cell, args)):
        out, aux_loss = run()
        results.append([out, aux_loss, *torch.autograd.grad((out * weight).sum() + aux_loss, leaves)])
    assert len(set(layers.parameters()) | set(cell.parameters())) == len(leaves) - 1
    for ours, theirs in zip(*results, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


def test_bf16_and_routing_in_fp32():
    """Routed in fp32 as the same weights in an fp32 model are, so that both choose the same experts."""
    layers, cell = layers_of(arguments(torch.bfloat16, moe_router_dtype="fp32"))
    x = torch.randn(6, 2, HIDDEN).bfloat16()
    out, state, aux_loss = layers[0](x, None)
    assert out.dtype == torch.bfloat16 and state.dtype == aux_loss.dtype == torch.float32
    args = arguments()
    doubles, double_cell = copy.deepcopy(layers).double(), copy.deepcopy(cell).double()
    expected, expected_loss = dense.stack_of_layers(x.double(), doubles[:1], double_cell, args)
    torch.testing.assert_close((x.double() + out), expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(aux_loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    (out.float().square().sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in layers[0].parameters())


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_one(tokens):
    layers, cell = layers_of(arguments())
    out, aux_loss = forward(torch.randn(tokens, 1, HIDDEN), layers)
    (out.sum() + aux_loss).backward()
    assert out.shape == (tokens, 1, HIDDEN) and aux_loss.isfinite()
    assert all(p.grad.isfinite().all() for p in (*layers.parameters(), *cell.parameters()))


def test_one_expert_may_take_all_tokens():
    args = arguments(moe_top_k=1, moe_router_rnn_bias=True)
    layers, cell = layers_of(args)
    with torch.no_grad():
        for layer in layers:
            layer.router.routing_layer.router_bias[3] = 50
    x = torch.randn(5, 3, HIDDEN)
    for ours, theirs in zip(forward(x, layers), dense.stack_of_layers(x, layers, cell, args), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [dMoE, MoE])
@pytest.mark.parametrize("make", [StockArguments, rmoe.Arguments])
def test_linear_is_stock_megablocks_to_the_bit(kind, make):
    args = arguments(moe_router_type="linear", bias=True)
    if make is StockArguments:
        args = StockArguments(**{k: v for k, v in vars(args).items() if not k.startswith(("moe_router", "moe_null"))})
    results = []
    for stock in (False, True):
        torch.manual_seed(1)
        if stock:  # around the one thing that register() changes
            layer = object.__new__(kind)
            layer.__init__(args)
        else:
            layer = kind(args)
        assert type(layer) is kind
        out, bias = layer(torch.ones(4, 2, HIDDEN))
        out.sum().backward()
        results.append([out, bias, *(p.grad for p in layer.parameters() if p.grad is not None)])
        assert len(moe.get_load_balancing_loss()) == 1  # its own way with losses, too
        moe.clear_load_balancing_loss()
        router.clear_router_zloss()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_experts_start_as_in_a_linear_model_of_the_same_seed():
    layers, _ = layers_of(arguments())
    torch.manual_seed(0)
    linear = dMoE(arguments(moe_router_type="linear"))
    assert torch.equal(layers[0].experts.mlp.w1, linear.experts.mlp.w1)
    assert isinstance(layers[0], dMoE)


def test_the_recurrence_is_registered_once_and_follows_copies():
    stack = rmoe.RecurrentStack([dMoE(arguments()) for _ in range(LAYERS)])
    assert [name for name in stack.state_dict() if "weight_hh" in name] == ["rnn_router.weight_hh"]
    x = torch.randn(3, 2, HIDDEN)
    for duplicate in (copy.deepcopy(stack), pickle.loads(pickle.dumps(_picklable(stack)))):
        assert duplicate.layers[1].router._shared[0] is duplicate.rnn_router is not stack.rnn_router
        assert torch.equal(stack(x)[0], duplicate(x)[0])
    saved = io.BytesIO()
    torch.save(stack.state_dict(), saved)
    saved.seek(0)
    other = rmoe.RecurrentStack([dMoE(arguments()) for _ in range(LAYERS)])
    other.load_state_dict(torch.load(saved))
    assert torch.equal(stack(x)[0], other(x)[0])


def _picklable(stack):
    """A copy without the lambdas of this test's arguments."""
    stack = copy.deepcopy(stack)
    for module in stack.modules():
        if hasattr(module, "args"):
            module.args.init_method = module.args.output_layer_init_method = torch.nn.init.zeros_
        if hasattr(module, "config"):
            object.__setattr__(module.config, "init_method", torch.nn.init.zeros_)
    return stack


def test_a_users_subclass_and_a_users_block_keep_working():
    class Loud(dMoE):
        def forward(self, x):
            return 2 * super().forward(x)

    class Block(torch.nn.Module):
        def __init__(self, moe_layer):
            super().__init__()
            self.moe = moe_layer

        def forward(self, x, router_state):
            out, router_state, aux_loss = self.moe(x, router_state)
            return x + out, router_state, aux_loss

    layers, cell = layers_of(arguments())
    x = torch.randn(3, 2, HIDDEN)
    loud = rmoe.RecurrentStack([Block(Loud(arguments(num_layers=1)))])
    loud.layers[0].moe.load_state_dict(layers[0].state_dict())
    loud.rnn_router.load_state_dict(cell.state_dict())
    torch.testing.assert_close(loud(x)[0], x + 2 * layers[0](x, None)[0])


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1)], ids=["strided", "transposed"])
def test_non_contiguous_input(view):
    layers, _ = layers_of(arguments())
    x = view(torch.randn(4, 6, HIDDEN))
    for ours, theirs in zip(layers[0](x, None), layers[0](x.contiguous(), None), strict=True):
        assert torch.equal(ours, theirs)


def test_fan_in_draws_by_the_inputs_and_its_cure_for_linear_does_too():
    router = dMoE(arguments(moe_router_rnn_bias=True, moe_router_init="fan_in")).router.routing_layer
    for weight, inputs in ((router.projector, HIDDEN), (router.router, STATE), (router.router_bias, STATE)):
        assert 0.5 / inputs**0.5 < weight.abs().max() <= 1 / inputs**0.5
    linear = dMoE(arguments(moe_router_type="linear")).router.layer
    assert linear.weight.abs().max() > 1 / HIDDEN**0.5  # N(0, .4)
    linear.reset_parameters()
    assert 0.9 / HIDDEN**0.5 < linear.weight.abs().max() <= 1 / HIDDEN**0.5


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            {"moe_router_type": "grru"},
            "moe_router_type: unknown router type 'grru', did you mean gru\\? .known: linear",
        ),
        ({"ffn_hidden_size": 15}, "ffn_hidden_size .15 a rank. times moe_num_experts .8. must be at least 128"),
        ({"moe_top_k": 9}, "moe_top_k must be between 1 and moe_num_experts"),
        ({"moe_router_rnn_hidden_size": 0}, "moe_router_rnn_hidden_size must be at least 1, got 0"),
        ({"moe_router_rnn_hidden_size": 12.0}, "moe_router_rnn_hidden_size must be a whole number, got 12.0"),
        ({"moe_router_rnn_hidden_size": True}, "moe_router_rnn_hidden_size must be a whole number, got True"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both True, and MegaBlocks would take fp16"),
        ({"shared_expert": True, "bias": True}, "shared_expert does not work with a returned bias"),
        ({"moe_router_rnn_init": "zeros"}, "moe_router_rnn_init must be one of"),
        ({"moe_router_init": "zeros"}, "moe_router_init must be one of init_method, fan_in, got 'zeros'"),
        ({"moe_router_init": "fan_in", "moe_router_type": "linear"}, "call layer.router.layer.reset_parameters"),
        ({"moe_router_dtype": "fp64"}, "moe_router_dtype must be"),
        ({"moe_router_type": None}, "moe_router_type must be a name, got None"),
        ({"moe_router_type": "no_such.module:Router"}, "cannot import 'no_such.module'"),
        (
            {"moe_router_type": "linear", "moe_router_rnn_hidden_size": 8},
            "rnn_hidden_size is no argument of moe_router_type='linear' but of eda, gru, lstm, rnn: leave it out",
        ),
        ({"moe_router_type": "mlp", "moe_router_rnn_bias": True}, "rnn_bias is no argument of moe_router_type='mlp'"),
        ({"moe_router_type": "eda", "moe_router_rnn_init": "init_method"}, "rnn_init is no argument of .*='eda'"),
        (
            {"moe_router_options": {"moe_router_mlp_hidden_size": 8}},
            "mlp_hidden_size is no argument of moe_router_type='gru' but of mlp: leave it out .gru takes",
        ),
        (
            {"moe_router_type": "linear", "moe_router_options": {"moe_router_recurrence": "detach"}},
            "moe_router_recurrence is no argument of moe_router_type='linear'",
        ),
        ({"moe_router_options": {"--moe-router-head": "xmoe"}}, "--moe-router-head is no argument of"),
        ({"moe_router_options": {"moe_router_rnn_bias": True}}, "rnn_bias is a field of Arguments, set it there"),
        ({"moe_router_options": None}, "moe_router_options must be a dictionary of names and values, got None"),
        ({"moe_router_options": {"moe_router_recurrence": "some"}}, "must be one of full, detach, none, got 'some'"),
        (
            {"moe_router_options": {"moe_router_residual": 1.0}, "moe_normalize_expert_weights": None},
            "moe_router_residual needs moe_normalize_expert_weights",
        ),
        ({"moe_router_options": {"moe_router_residual": -1}}, "residual must be a number of at least 0, got -1.0"),
        ({"moe_router_options": {"moe_router_residual": "1"}}, "residual must be a number, got '1'"),
        ({"moe_router_options": {"moe_router_share_head": "4"}}, "share-head 4: the model has 3 layers, use all"),
        ({"moe_router_type": "product_key"}, "='product_key': product_key needs a square number of experts"),
        ({"moe_null_experts": 2}, "moe_null_experts=2 does not work with MegaBlocks' own layers"),
        ({"moe_null_experts": 2, "moe_router_type": "linear"}, "moe_null_experts=2 does not work with MegaBlocks'"),
        ({"moe_expert_model_parallelism": True}, "init_process_group"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(changes, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        dMoE(arguments(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ranks, experts, features, reason",
    [(3, 8, 96, "8.*3 expert parallel ranks"), (16, 8, 97, "97.*2 ranks an expert"), (6, 4, 96, "4.*6 expert")],
)
def test_experts_that_do_not_fit_the_ranks_are_refused(monkeypatch, ranks, experts, features, reason):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: ranks)
    for kind in (dMoE, MoE):
        with pytest.raises(UsageError, match=reason):
            kind(arguments(moe_expert_model_parallelism=True, moe_num_experts=experts, ffn_hidden_size=features))
