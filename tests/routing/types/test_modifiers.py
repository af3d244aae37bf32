"""What changes any type: recurrence, residual scores and heads, held against definitions and hand-cut graphs."""

import pytest
import torch

from rmoe_megablocks.routing import HEAD, RECURRENCE, RESIDUAL
from tests.routing.types.built import E, H, Stack, T, gradients, having, inputs_of, same
from tests.routing.types.definitions import DEFINED, of_type, softmax

RECURRENT = having(RECURRENCE)
ALPHA = 0.5


@pytest.mark.parametrize("name", RECURRENT)
def test_without_recurrence_every_layer_starts_from_zero(name):
    stack, inputs = Stack(name, {RECURRENCE: "none"}), inputs_of()
    assert stack.type.state_size(stack.config) == 0
    logits, states = stack(inputs)
    expected, _ = stack.defined(of_type(DEFINED, name), inputs, between=lambda h: None)
    same(logits, expected)
    assert states == [None] * len(inputs)
    leaves = [*inputs, *stack.trained()]
    same(gradients((logits, states), leaves), gradients((expected, states), leaves))
    full = Stack(name, {RECURRENCE: "full"})
    assert (logits[1] - full(inputs)[0][1]).abs().max() > 1e-2  # the same weights: the state matters


@pytest.mark.parametrize("name", RECURRENT)
def test_detach_has_the_gradient_with_the_path_cut(name):
    stack, inputs = Stack(name, {RECURRENCE: "detach"}), inputs_of()
    full = Stack(name, {RECURRENCE: "full"})
    full.load_state_dict(stack.state_dict())
    cut = lambda h: None if h is None else h.detach()  # noqa: E731
    ours, by_hand = stack(inputs), full(inputs, between=cut)
    for mine, other in zip(ours, full(inputs), strict=True):
        same(mine, other, 0)
    mine = gradients(ours, [*inputs, *stack.trained()])
    same(mine, gradients(by_hand, [*inputs, *full.trained()]), 0)
    same(mine, gradients(stack.defined(of_type(DEFINED, name), inputs, between=cut), [*inputs, *stack.trained()]))
    whole = gradients(full(inputs), [*inputs, *full.trained()])
    assert (mine[0] - whole[0]).abs().max() > 1e-3 and torch.equal(mine[len(inputs) - 1], whole[len(inputs) - 1])


def with_scores(definition, alpha: float, recurrence: str = "full"):
    """scores_i = softmax(logits_i) + alpha * scores_{i-1}, which travel behind the state; gives the scores out."""

    def define(w, s, x, h):
        own, previous = (None, 0) if h is None else (h[:, :-E] if h.shape[1] > E else None, h[:, -E:])
        if recurrence == "detach" and own is not None:
            own = own.detach()
        logits, state = definition(w, s, x, None if recurrence == "none" else own)
        scores = softmax(logits) + alpha * previous
        kept = scores if state is None or recurrence == "none" else torch.cat((state, scores), dim=-1)
        return scores, kept

    return define


COMBINED = [
    *((name, {}) for name in having(RESIDUAL)),
    *((name, {RECURRENCE: choice}) for name in RECURRENT for choice in ("detach", "none")),
    *((name, {HEAD: "xmoe"}) for name in having(HEAD)),
]


@pytest.mark.parametrize(("name", "chosen"), COMBINED, ids=lambda x: x if isinstance(x, str) else "".join(x.values()))
@pytest.mark.parametrize("alpha", [ALPHA, 1.0])
def test_residual_scores_are_the_weighted_sum(name, chosen, alpha):
    stack, inputs = Stack(name, {**chosen, RESIDUAL: alpha}), inputs_of()
    logits, states = stack(inputs)
    definition = with_scores(of_type(DEFINED, name), alpha, chosen.get(RECURRENCE, "full"))
    scores, expected = stack.defined(definition, inputs)
    same([logit.exp() for logit in logits], scores)
    same(states, expected)
    assert all(state.shape == (T, stack.type.state_size(stack.config)) for state in states)
    sums = [sum(alpha**power for power in range(layer + 1)) for layer in range(len(inputs))]
    same([score.sum(-1) for score in scores], [torch.full((T,), total, dtype=torch.float64) for total in sums])
    leaves = [*inputs, *stack.trained()]
    same(gradients((logits, states), leaves), gradients(([score.log() for score in scores], expected), leaves))


@pytest.mark.parametrize("name", having(RESIDUAL))
def test_residual_weights_of_the_chosen_experts_are_those_of_the_scores(name):
    """What a host makes of the logits: its softmax, over all experts or over the chosen ones."""
    stack, inputs = Stack(name, {RESIDUAL: ALPHA}), inputs_of()
    logits, states = stack(inputs)
    scores = states[-1][:, -E:]
    same([logits[-1].softmax(-1)], [scores / scores.sum(-1, keepdim=True)])
    top, chosen = logits[-1].topk(2)
    picked = scores.gather(1, chosen)
    same([top.softmax(-1)], [picked / picked.sum(-1, keepdim=True)])


@pytest.mark.parametrize("name", having(RESIDUAL))
def test_scores_of_zero_are_none(name):
    """What layers without experts pass on through a pipeline: zeros, in values and in gradients."""
    stack, (x, *_) = Stack(name, {RESIDUAL: ALPHA}), inputs_of()
    zeros = torch.zeros(T, stack.type.state_size(stack.config), dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in stack.layers[0].parameters() if p.requires_grad)]
    results = [stack.layers[0](x, h, stack.shared) for h in (None, zeros)]
    for ours, other in zip(*results, strict=True):
        same([ours], [other])
    same(*(gradients(([logits], [h]), leaves) for logits, h in results))
    assert gradients((results[1][:1], results[1][1:]), [zeros])[0].isfinite().all()


@pytest.mark.parametrize("name", having(RESIDUAL))
def test_gradcheck_of_a_residual(name):
    stack = Stack(name, {RESIDUAL: ALPHA})
    size = stack.type.state_size(stack.config)
    h = torch.rand(2, size, dtype=torch.float64) + 0.1
    x = torch.randn(2, H, dtype=torch.float64)
    inputs = (x.requires_grad_(), h.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, h: stack.layers[1](x, h, stack.shared), inputs)


@pytest.mark.parametrize("name", having(HEAD))
@pytest.mark.parametrize("head", HEAD.choices)
def test_heads_read_the_state(name, head):
    stack, inputs = Stack(name, {HEAD: head}), inputs_of()
    ours, theirs = stack(inputs), stack.defined(of_type(DEFINED, name), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)
    leaves = [*inputs, *stack.trained()]
    same(gradients(ours, leaves), gradients(theirs, leaves))
