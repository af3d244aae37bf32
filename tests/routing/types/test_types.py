"""Every registered type equals its definition, in logits, states and gradients, and has the papers' parameters."""

import pytest
import torch

from rmoe_megablocks.routing import RouterLayer, RoutingConfig, get_router_type, register, registry
from tests.routing.types import definitions
from tests.routing.types.built import TYPES, E, H, Stack, T, gradients, inputs_of, same
from tests.routing.types.definitions import COUNTS, DEFINED, of_type

BIASED = [name for name in TYPES if "moe_router_rnn_bias" in [a.dest for a in get_router_type(name).arguments]]


def switched_on(name: str) -> dict:
    """All switches of a type on."""
    return {argument: True for argument in get_router_type(name).arguments if argument.default is False}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("switches", [False, True])
def test_logits_states_and_gradients_equal_the_definition(name, switches):
    definition = of_type(DEFINED, name)
    stack, inputs = Stack(name, switched_on(name) if switches else None), inputs_of()
    ours, theirs = stack(inputs), stack.defined(definition, inputs)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)
    assert all((state is None) == (stack.type.state_size(stack.config) == 0) for state in ours[1])
    leaves = [*inputs, *stack.trained()]
    same(gradients(ours, leaves), gradients(theirs, leaves))


class OneStep(torch.nn.Module):
    """A layer with what is shared."""

    def __init__(self, layer, shared) -> None:
        super().__init__()
        self.layer, self.shared = layer, shared

    def forward(self, x, h):
        return self.layer(x, h, self.shared)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("first", [True, False])
def test_gradcheck(name, first):
    """Of logits and state by x, the state, and everything that is trained."""
    stack = Stack(name)
    layer, size = stack.layers[0], stack.type.state_size(stack.config)
    step = OneStep(layer, stack.shared)
    weights = {n: p for n, p in step.named_parameters() if p.requires_grad}
    x = torch.randn(2, H, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(2, size, dtype=torch.float64, requires_grad=True)] if size and not first else []

    def function(x, *rest):
        h, given = (rest[0], rest[1:]) if state else (None, rest)
        logits, h = torch.func.functional_call(step, dict(zip(weights, given, strict=True)), (x, h))
        return logits if h is None else (logits, h)

    assert torch.autograd.gradcheck(function, (x, *state, *weights.values()))


@pytest.mark.parametrize("name", TYPES)
def test_all_that_is_trained_has_a_gradient_in_every_layer_and_nothing_else(name):
    """In the first layer too, where no state comes in: overlapped reductions wait for each parameter."""
    stack, inputs = Stack(name), inputs_of()
    logits, _ = stack.layers[0](inputs[0], None, stack.shared)
    logits.sum().backward()
    own = [*stack.layers[0].parameters(), *(stack.shared.parameters() if stack.shared is not None else ())]
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in own)
    frozen = {n for n, p in stack.layers[0].named_parameters() if not p.requires_grad}
    assert frozen == FROZEN.get(name, set())


FROZEN = {"random": {"weight"}, "hyper": {"fc1", "fc1_bias", "fc2", "fc2_bias"}}


@pytest.mark.parametrize("name", [name for name in TYPES if Stack(name).shared is not None])
def test_what_is_shared_gets_the_sum_of_its_layers_gradients(name):
    stack, inputs = Stack(name), inputs_of()
    copies = [{n: p.detach().clone().requires_grad_() for n, p in stack.shared.named_parameters()} for _ in inputs]
    apart = stack.defined(of_type(DEFINED, name), inputs, shared=copies)
    parts = [gradients(apart, list(copy.values())) for copy in copies]
    ours = gradients(stack(inputs), list(stack.shared.parameters()))
    same(ours, [sum(of_layers) for of_layers in zip(*parts, strict=True)])
    assert all(part.abs().max() > 1e-3 for part in parts[-1])


@pytest.mark.parametrize("name", TYPES)
def test_bf16_weights_are_computed_with_in_fp32(name):
    stack = Stack(name)
    layer, shared = stack.layers[1].bfloat16(), stack.shared and stack.shared.float()
    size = stack.type.state_size(stack.config)
    x, h = torch.randn(T, H, dtype=torch.bfloat16), torch.randn(T, size) if size else None
    logits, state = layer(x, h, shared, torch.float32)
    expected, expected_state = layer.float()(x.float(), h, shared)
    assert logits.dtype == torch.float32 and (state is None or state.dtype == torch.float32)
    torch.testing.assert_close(logits, expected)
    assert state is None or torch.equal(state, expected_state)


@pytest.mark.parametrize("name", TYPES)
def test_parameters_in_the_papers_medium_model(name):
    config = RoutingConfig(definitions.H, definitions.E, num_layers=8)
    kind = get_router_type(name)
    layer, shared = kind.build_layer(config), kind.build_shared(config)
    counted = tuple(0 if m is None else sum(p.numel() for p in m.parameters()) for m in (layer, shared))
    assert counted == of_type(COUNTS, name)


# In millions, cut off behind the last place given; xmoe and hyper beside an unused linear gate of 16 (352 + 1) a layer
PUBLISHED = {"mlp": 0.75, "random": 0.04, "hyper": 12.3, "cosine": 0.04, "xmoe": 0.09, "gru": 0.47}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    layer, shared = COUNTS[name]
    gate = definitions.E * (definitions.H + 1) if name in ("xmoe", "hyper") else 0
    places = 10 ** len(str(PUBLISHED[name]).partition(".")[2])
    assert int((8 * (layer + gate) + shared) / 1e6 * places) / places == PUBLISHED[name]


def test_a_type_without_a_definition_fails():
    @register("tomorrow")
    class Tomorrow(RouterLayer):
        """a type of tomorrow."""

        def route(self, x_TH, h_TP, shared, dtype):
            return x_TH[..., :E], None

    try:
        with pytest.raises(pytest.fail.Exception, match="router type 'tomorrow' has no definition"):
            of_type(DEFINED, "tomorrow")
    finally:
        registry.unregister("tomorrow")
