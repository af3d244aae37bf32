"""What a user of the MegaBlocks layers may do wrong, each with the error that says so."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rmoe_megablocks import megablocks as rmoe
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import RoutingStateError
from tests.megablocks.test_recurrent_layers import EXPERTS, FEATURES, HIDDEN, LAYERS, STATE, arguments, layers_of

from megablocks import Arguments as StockArguments  # isort: skip
from megablocks import MoE, dMoE  # isort: skip


@pytest.fixture
def layer():
    layers, _ = layers_of(arguments())
    return layers[0]


X = torch.randn(4, 2, HIDDEN)


@pytest.mark.parametrize(
    ("x", "state", "reason"),
    [
        (X[..., :-1], None, r"x of a dMoE must be \[..., H\] with hidden_size H = 16, got \[4, 2, 15\]"),
        (X[0, 0], None, r"x of a dMoE must be \[..., H\] with hidden_size H = 16, got \[16\]"),
        (X.bfloat16(), None, "x is torch.bfloat16 and the dMoE's weights are torch.float32: convert one"),
        (X.double(), None, "x is torch.float64 and the dMoE's weights are torch.float32"),
        (X.long(), None, "x is torch.int64"),
        (X.to("meta"), None, "x is on meta and the dMoE's weights are on cpu"),
        (X, torch.zeros(4, 1, STATE), r"state must be None or of shape \[4, 2, 12\], got \[4, 1, 12\]"),
        (X, torch.zeros(4, 2, STATE + 1), r"of shape \[4, 2, 12\], got \[4, 2, 13\]"),
        (X, torch.zeros(STATE), r"of shape \[4, 2, 12\], got \[12\]"),
        (X, torch.zeros(4, 2, STATE).bfloat16(), "of dtype torch.float32, got torch.bfloat16"),
        (X, torch.zeros(4, 2, STATE, device="meta"), "of device cpu, got meta"),
    ],
)
def test_an_input_or_state_that_does_not_fit(layer, x, state, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        layer(x, state)
    assert "\n" not in str(caught.value)
    assert layer(X, None)[0].isfinite().all()  # the failed call has left nothing behind


def test_a_moe_takes_three_dimensions_and_a_dmoe_any():
    layers, _ = layers_of(arguments(), MoE)
    with pytest.raises(ValueError, match=r"x of a MoE must be \[S, B, H\].*got \[8, 16\]"):
        layers[0](X.flatten(0, 1), None)
    layers, _ = layers_of(arguments())
    flat, deep = layers[0](X.flatten(0, 1), None), layers[0](X[:, None], None)
    for a, b in zip(flat[:2], deep[:2], strict=True):
        torch.testing.assert_close(a, b.flatten(0, -2))


@pytest.mark.parametrize("bias", [False, True])
def test_a_stock_call_is_told_what_the_layer_takes_and_returns(bias):
    layers, _ = layers_of(arguments(bias=bias))
    values = "out, bias, router_state, aux_loss" if bias else "out, router_state, aux_loss"
    with pytest.raises(TypeError, match=rf"called as {values} = layer\(x, router_state\), with router_state=None"):
        out, bias = layers[0](X)


def test_arguments_alone_decide_the_router():
    """Without register() a dMoE would silently have MegaBlocks' own router."""
    original = MoE.__new__
    try:
        del MoE.__new__
        assert type(dMoE(arguments(moe_router_type="gru"))).__name__ == "RecurrentdMoE"
    finally:
        MoE.__new__ = original


def test_autocast_is_left_to_megablocks():
    layers, cell = layers_of(arguments(memory_optimized_mlp=True))
    _, expected_state, _ = layers[0](X, None)
    with torch.autocast("cpu", torch.bfloat16):
        out, state, _ = layers[0](X, None)
    assert out.isfinite().all()
    torch.testing.assert_close(state.float(), expected_state, rtol=0.05, atol=0.05)


def stack_of(*blocks):
    return rmoe.RecurrentStack(blocks)


class Block(torch.nn.Module):
    def __init__(self, result=None):
        super().__init__()
        self.moe = dMoE(arguments(num_layers=1))
        self.result = result or (lambda x, state, loss: (x, state, loss))

    def forward(self, x, router_state):
        return self.result(*self.moe(x, router_state))


class Takes1(torch.nn.Module):
    def forward(self, x):
        return x


def test_a_stack_checks_what_its_blocks_take():
    with pytest.raises(UsageError, match=r"layer 1 of RecurrentStack \(Takes1\) must take \(x, router_state\)"):
        stack_of(dMoE(arguments(num_layers=1)), Takes1())
    linear = dMoE(arguments(moe_router_type="linear"))
    with pytest.raises(UsageError, match=r"layer 0 of RecurrentStack \(dMoE\) must take"):
        stack_of(linear)
    with pytest.raises(UsageError, match="all routers are MegaBlocks' own: build dMoE or MoE"):
        rmoe.share_recurrence([linear])
    with pytest.raises(UsageError, match="cannot return its bias"):
        stack_of(dMoE(arguments(bias=True, num_layers=1)))


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda x, state, loss: x, "returned a Tensor"),
        (lambda x, state, loss: x[:3], "returned a Tensor"),  # would unpack into three values
        (lambda x, state, loss: (x, state), "returned 2 values"),
    ],
)
def test_a_stack_checks_what_its_blocks_return(result, found):
    with pytest.raises(TypeError, match=rf"layer 0 of RecurrentStack \(Block\) must return .*, {found}"):
        stack_of(Block(result))(X)


def test_a_block_that_loses_the_state():
    class Forgetful(torch.nn.Module):
        def forward(self, x, router_state):
            return x, None, 0

    with pytest.raises(TypeError, match=r"layer 1 of RecurrentStack \(Forgetful\) returned None as router_state"):
        stack_of(Block(), Forgetful())(X)
    assert stack_of(Forgetful(), Block())(X)[0].shape == X.shape  # before the first layer there is none


def test_layers_that_cannot_share():
    def two(**changes):
        return [dMoE(arguments(num_layers=2)), dMoE(arguments(num_layers=2, **changes))]

    for changes, reason in (
        ({"moe_router_rnn_hidden_size": 13}, "agree on moe_router_rnn_hidden_size, found .*12.*13"),
        ({"moe_router_dtype": "fp32"}, "agree on moe_router_dtype"),
        ({"bf16": True}, "agree on fp16 and bf16"),
        ({"moe_loss_weight": 0.5}, "agree on moe_loss_weight"),
        ({"moe_router_rnn_bias": True}, "agree on moe_router_rnn_bias"),
        (
            {"moe_router_options": {"moe_router_residual": 0.5}, "moe_zloss_weight": 0},
            "agree on moe_router_residual, found .*0.0.*0.5",
        ),
        (
            {"moe_router_options": {"moe_router_share_head": "all"}},
            "layers of one model must agree on moe_router_share",
        ),
    ):
        with pytest.raises(UsageError, match=reason):
            rmoe.share_recurrence(two(**changes))
    layers, _ = layers_of(arguments())
    with pytest.raises(UsageError, match="share something already"):
        rmoe.RecurrentStack(layers)
    with pytest.raises(RuntimeError, match="share_recurrence"):
        dMoE(arguments())(X, None)


def test_num_layers_is_the_number_of_layers():
    """By default it is 1: the balancing loss of every layer would have the weight of all together."""
    args = arguments(num_layers=1)
    with pytest.raises(UsageError, match="num_layers=1, but 4 layers have a gru router"):
        rmoe.RecurrentStack(dMoE(args) for _ in range(4))
    rmoe.RecurrentStack(dMoE(arguments(num_layers=1, moe_loss_weight=0)) for _ in range(4))
    twice = dMoE(arguments(num_layers=2))
    out, aux_loss = rmoe.RecurrentStack([twice, twice])(X)
    assert aux_loss > 0


def test_one_expert_and_one_token():
    layers, _ = layers_of(arguments(moe_num_experts=1, moe_top_k=1, ffn_hidden_size=128))
    out, state, aux_loss = layers[0](X[:1, :1], None)
    assert out.isfinite().all() and state.shape == (1, 1, STATE) and aux_loss.isfinite()
    with pytest.raises(UsageError, match="moe_top_k must be between 1 and moe_num_experts .1., got 2"):
        dMoE(arguments(moe_num_experts=1, ffn_hidden_size=128))


def test_a_call_that_fails_leaves_no_state(layer):
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
        hook = layer.experts.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        stack.callback(hook.remove)
        layer(X, torch.zeros(4, 2, STATE))
    assert layer.router.slot.empty
    assert torch.equal(layer(X, None)[0], layer(X, None)[0])


def test_a_layer_entered_while_it_runs(layer):
    hook = layer.experts.register_forward_pre_hook(lambda module, args: layer(X, None) and None)
    with pytest.raises(RoutingStateError, match="two forward passes of a layer must not overlap"):
        layer(X, None)
    hook.remove()
    assert layer.router.slot.empty


@pytest.mark.parametrize("training", [True, False])
def test_a_router_called_twice_or_alone(layer, training):
    layer.train(training)
    with pytest.raises(RoutingStateError, match="without a routing state"):
        layer.router(X)
    hook = layer.experts.register_forward_pre_hook(lambda *args: layer.router(X) and None)
    with pytest.raises(RoutingStateError, match="ran twice"), torch.no_grad():
        layer(X, None)
    hook.remove()
    with pytest.raises(RoutingStateError, match="fetched, but no state"):
        layer.router.take()


def test_a_recomputation_that_torch_ends_early_leaves_no_state():
    """Without early stop torch runs the layer to its end; with it, an exception ends it in the midst."""
    layers, _ = layers_of(arguments())
    x = X.clone().requires_grad_()
    for _ in range(2):
        out, state, aux_loss = checkpoint(layers[0], x, None, use_reentrant=False)
        out.sum().backward()
        assert layers[0].router.slot.empty


def test_stock_arguments_need_the_fields_of_the_router():
    args = StockArguments(
        hidden_size=HIDDEN,
        ffn_hidden_size=FEATURES,
        moe_num_experts=EXPERTS,
        moe_top_k=2,
        num_layers=LAYERS,
        device="cpu",
        mlp_impl="grouped",
    )
    args.bf16, args.moe_router_type = True, "gru"
    with pytest.raises(UsageError, match="fp16 and bf16"):
        dMoE(args)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"moe_router_mlp_hidden_size": 8}, "moe_router_mlp_hidden_size is no argument of moe_router_type='gru'"),
        ({"moe_router_residual": -1.0}, "moe_router_residual must be a number of at least 0, got -1"),
        ({"moe_router_residual": 0.5}, "moe_router_residual does not work with moe_zloss_weight"),
    ],
)
def test_a_types_options(options, reason):
    weights = {"moe_zloss_weight": 0.1 if options.get("moe_router_residual") == 0.5 else 0.0}
    with pytest.raises(ValueError, match=reason) as caught:
        layers_of(arguments(moe_router_options=options, **weights))
    assert "\n" not in str(caught.value)
