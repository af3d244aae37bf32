"""Every router type and choice of the registry in MegaBlocks' layers, against a naive mixture of dense experts.

The types' own values have tests in tests/routing. Here a type's step is called layer by layer, with the state handed on
and the place counted by hand, and what it says is held against what comes out of the layers.
"""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rmoe_megablocks import megablocks as rmoe
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import INIT, RNN_INIT, RoutingConfig, get_router_type, router_types
from rmoe_megablocks.routing.parts.implementation import IMPL
from tests.megablocks import dense
from tests.megablocks.test_recurrent_layers import HIDDEN, arguments

from megablocks import MoE, dMoE  # isort: skip

LAYERS, EXPERTS, WIDTH = 4, 16, 8
DROPLESS = {"moe_capacity_factor": 0}  # of a MoE: room for every token
#: of arguments that take words and numbers, what is tried; numbers and words of a choice come from the registry
WORDS = {
    "moe_router_share_projector": ("3", "all"),
    "moe_router_share_head": ("2", "all"),
    "moe_router_impl": ("recompute", "auto"),  # triton needs a GPU
}


def own_types() -> list[str]:
    return [name for name in router_types() if get_router_type(name).replaces_hosts]


def stateless_types() -> list[str]:
    return [name for name in own_types() if not get_router_type(name).state_size(RoutingConfig(HIDDEN, EXPERTS))]


def choices(name: str) -> list[dict]:
    """One changed argument at a time."""
    found = [{}]
    for argument in get_router_type(name).arguments:
        if argument in (INIT, RNN_INIT):
            continue  # how numbers are drawn
        if argument is IMPL and not get_router_type(name).layer.implementations:
            continue
        kind = type(argument.default)
        values = WORDS.get(argument.dest) or [choice for choice in argument.choices if choice != argument.default]
        values = values or {bool: [True], int: [WIDTH + 1], float: [0.5]}[kind]
        found += [{argument.dest: value} for value in values]
    return found


CASES = [(name, change) for name in own_types() for change in choices(name)]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in change.items())]) for name, change in CASES]


def arguments_of(name: str, change=(), **more) -> rmoe.Arguments:
    fields = {key: value for key, value in dict(change).items() if key in rmoe.Arguments.__dataclass_fields__}
    options = {key: value for key, value in dict(change).items() if key not in fields}
    for argument in get_router_type(name).arguments:  # small widths
        if type(argument.default) is int and argument.dest not in change:
            (fields if argument.dest in rmoe.Arguments.__dataclass_fields__ else options)[argument.dest] = WIDTH
    defaults = dict(
        num_layers=LAYERS,
        moe_num_experts=EXPERTS,
        init_method=lambda w: torch.nn.init.normal_(w, std=0.25),
        output_layer_init_method=lambda w: torch.nn.init.normal_(w, std=0.25),
        moe_router_type=name,
        moe_router_options=options,
    )
    if "moe_router_residual" in change:
        defaults["moe_zloss_weight"] = 0  # which means nothing to it, and is refused
    return arguments(**(defaults | fields | more))


def built(args, kind=dMoE) -> rmoe.RecurrentStack:
    torch.manual_seed(0)
    stack = rmoe.RecurrentStack(kind(args) for _ in range(LAYERS))
    for parameter in stack.parameters():
        if parameter.ndim == 1 and len(parameter) > 1:  # biases start at 0, which would hide them
            torch.nn.init.normal_(parameter, std=0.3)
    return stack


def forward(x, stack, states, call=lambda layer, *args: layer(*args)):
    state, total = None, 0.0
    for layer in stack.layers:
        out, state, aux_loss = call(layer, x, state)
        states.append(state)
        x, total = x + out, total + aux_loss
    return x, total


def step(layer, x_TH, state, shared, index):
    """A router type's own step in the place ``index``, whatever the layer was told."""
    own = copy.copy(layer)
    own.index = index
    return own(x_TH, state, shared)


def trained(stack):
    return [parameter for parameter in stack.parameters() if parameter.requires_grad]


def loss_of(out, total, states):
    torch.manual_seed(2)
    loss = (out * torch.randn_like(out)).sum() + total
    return loss + sum((s.flatten() * torch.randn(s.numel())).sum() for s in states if s is not None)


@pytest.mark.parametrize(("name", "change"), CASES, ids=IDS)
@pytest.mark.parametrize("kind", [dMoE, MoE])
def test_outputs_states_losses_and_gradients_are_the_naive_mixtures(name, change, kind):
    args = arguments_of(name, change, **(DROPLESS if kind is MoE else {}))
    stack = built(args, kind)
    x = torch.randn(5, 3, HIDDEN, requires_grad=True)
    leaves, results = [x, *trained(stack)], []
    for run in (
        lambda states: forward(x, stack, states),
        lambda states: dense.stack_of_layers(x, stack.layers, stack.rnn_router, args, step, states),
    ):
        states = []
        out, total = run(states)
        grads = torch.autograd.grad(loss_of(out, total, states), leaves, allow_unused=True, materialize_grads=True)
        results.append([out, total, *(s.reshape(15, -1) for s in states if s is not None), *grads])
    config = stack.layers[0].router.routing_layer.config
    width = get_router_type(name).state_size(config)
    assert len(results[0]) == 2 + LAYERS * bool(width) + len(leaves)
    assert all(state.shape == (15, width) for state in results[0][2 : 2 + LAYERS * bool(width)])
    silent = 0
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max().item()
        silent += scale == 0
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5 * scale)
    # what multiplies a state of 0 has no gradient: in the first layer, or in all that are cut off
    assert silent <= (name == "eda") or change == {"moe_router_recurrence": "none"}


@pytest.mark.parametrize("name", own_types())
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute(name, reentrant):
    stack = built(arguments_of(name, {"moe_router_residual": 0.5}))
    results = []
    for call in (lambda layer, *a: layer(*a), lambda layer, *a: checkpoint(layer, *a, use_reentrant=reentrant)):
        stack.zero_grad()
        torch.manual_seed(1)
        x, states = torch.randn(5, 3, HIDDEN, requires_grad=True), []
        out, total = forward(x, stack, states, call)
        loss_of(out, total, states).backward()
        results.append([out, total, *states, x.grad, *(p.grad for p in trained(stack))])
        assert all(layer.router.slot.empty for layer in stack.layers)
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("name", stateless_types())
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_of_a_type_without_a_state_returns_none(name, reentrant):
    stack, states = built(arguments_of(name)), []
    out, total = forward(
        torch.randn(5, 3, HIDDEN, requires_grad=True),
        stack,
        states,
        lambda layer, *a: checkpoint(layer, *a, use_reentrant=reentrant),
    )
    (out.sum() + total).backward()
    assert states == [None] * LAYERS and all(p.grad is not None for p in trained(stack))


@pytest.mark.parametrize("name", own_types())
def test_a_step_of_the_optimizer_trains_what_is_to_be_trained_and_nothing_else(name):
    stack = built(arguments_of(name))
    before = copy.deepcopy(stack.state_dict())
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        out, aux_loss = stack(torch.randn(5, 3, HIDDEN))
        (out.square().sum() + aux_loss).backward()
        optimizer.step()
    frozen = {key for key, parameter in stack.named_parameters() if not parameter.requires_grad}
    for key, value in stack.state_dict().items():
        assert torch.equal(value, before[key]) == (key in frozen), key
    assert bool(frozen) == (name in ("random", "hyper"))


@pytest.mark.parametrize(("name", "change"), CASES, ids=IDS)
def test_copies(name, change):
    """deepcopy, pickle and a state dict: the copy has its own shared module, one for all its layers."""
    args = arguments_of(name, change, init_method=torch.nn.init.xavier_uniform_)
    args.output_layer_init_method = torch.nn.init.xavier_uniform_  # one that can be pickled
    stack = built(args)
    loaded = rmoe.RecurrentStack(dMoE(args) for _ in range(LAYERS))
    loaded.load_state_dict(stack.state_dict())
    x = torch.randn(5, 3, HIDDEN)
    expected = stack(x)
    for duplicate in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), loaded):
        for ours, theirs in zip(duplicate(x), expected, strict=True):
            assert torch.equal(ours, theirs)
        shared = {id(layer.router._shared[0]) for layer in duplicate.layers}
        assert shared == {id(duplicate.rnn_router)}
        assert stack.rnn_router is None or duplicate.rnn_router is not stack.rnn_router
        kept = {key: p.requires_grad for key, p in duplicate.named_parameters()}
        assert kept == {key: p.requires_grad for key, p in stack.named_parameters()}
        assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in stack.parameters()}


@pytest.mark.parametrize("name", own_types())
def test_what_layers_share(name):
    args = arguments_of(name)
    layers = torch.nn.ModuleList(dMoE(args) for _ in range(LAYERS))
    x = torch.randn(5, 3, HIDDEN)
    config = layers[0].router.routing_layer.config
    if get_router_type(name).shares(config):
        with pytest.raises(RuntimeError, match="not been given what it shares with the others: call share_recurrence"):
            layers[0](x, None)
        assert rmoe.share_recurrence(layers) is not None
        with pytest.raises(UsageError, match="share something already"):
            rmoe.share_recurrence(layers)
    else:
        before = layers[0](x, None)[0]
        assert rmoe.share_recurrence(layers) is None
        assert rmoe.share_recurrence(layers) is None
        assert torch.equal(layers[0](x, None)[0], before)
    assert layers[0](x, None)[0].isfinite().all()
    with pytest.raises(UsageError, match=f"num_layers={LAYERS}, but 1 layers have a {name} router"):
        rmoe.share_recurrence([dMoE(args)])


@pytest.mark.parametrize("name", own_types())
def test_bf16_routed_in_fp32(name):
    stack = built(arguments_of(name, dtype=torch.bfloat16, moe_router_dtype="fp32"))
    states = []
    out, aux_loss = forward(torch.randn(5, 3, HIDDEN).bfloat16(), stack, states)
    assert out.dtype == torch.bfloat16 and aux_loss.dtype == torch.float32
    assert all(state is None or state.dtype == torch.float32 for state in states)
    (out.float().square().sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trained(stack))
    assert all(p.dtype == torch.bfloat16 for p in stack.parameters())


def test_blocks_need_all_layers_and_each_once():
    args = arguments_of("gru", {"moe_router_share_projector": "2"}, moe_loss_weight=0)
    with pytest.raises(UsageError, match="num_layers=4, but 3 layers are here: blocks of layers that share need all"):
        rmoe.share_recurrence([dMoE(args) for _ in range(3)])
    twice = dMoE(args)
    with pytest.raises(UsageError, match="a layer that runs twice cannot belong to two blocks"):
        rmoe.share_recurrence([dMoE(args), dMoE(args), twice, twice])
    everywhere = arguments_of("gru", {"moe_router_share_projector": "all"}, moe_loss_weight=0)
    everywhere.num_layers = 1
    stack = rmoe.RecurrentStack(dMoE(everywhere) for _ in range(3))
    assert len(stack.rnn_router.projectors) == 1 and stack(torch.randn(5, 3, HIDDEN))[0].isfinite().all()


def test_the_cases_are_the_registrys():
    """A type that is registered tomorrow is in the list, and so are all that belong to the package."""
    assert len(own_types()) >= 11 and ("gru", {"moe_router_head": "xmoe"}) in CASES
    assert ("lstm", {"moe_router_share_head": "2"}) in CASES and ("mlp", {"moe_router_residual": 0.5}) in CASES
    assert RoutingConfig(8, 4).options == {}
