"""Every router type and modifier in the model: logits against definitions, and against a chain made by hand."""

import pytest
import torch

from rmoe_megablocks.routing import (
    HEAD,
    LINEAR,
    RECURRENCE,
    RESIDUAL,
    SHARE_HEAD,
    SHARE_PROJECTOR,
    get_router_type,
)
from tests.huggingface.built import TYPES, M, close, gradients, having, model, routers, tokens
from tests.routing.types.definitions import DEFINED, of_type


def routed(made, **inputs):
    """What each router read [B, S, H] and the logits it gave [B, S, E], of one call."""
    read = []
    hooks = [r.register_forward_pre_hook(lambda _, args: read.append(args[0].detach())) for r in routers(made)]
    found = made(tokens(), output_router_logits=True, **inputs).router_logits
    for hook in hooks:
        hook.remove()
    return read, [logits.view(*x.shape[:-1], -1) for x, logits in zip(read, found, strict=True)]


@pytest.mark.parametrize("name", [name for name in TYPES if get_router_type(name).replaces_hosts])
def test_logits_of_all_layers_equal_the_definition_with_the_state_handed_on(name):
    made, definition = model(name), of_type(DEFINED, name)
    read, found = routed(made)
    shared = made.model.shared_router
    h, shared = None, {} if shared is None else dict(shared.named_parameters())
    for router, x, logits in zip(routers(made), read, found, strict=True):
        expected, h = definition(dict(router.layer.named_parameters()), shared, x.flatten(0, 1), h)
        close(logits.flatten(0, 1), expected, 2e-5)


def test_logits_of_the_linear_router():
    made = model(LINEAR)
    for router, x, logits in zip(routers(made), *routed(made), strict=True):
        close(logits, x @ router.weight.T, 1e-5)


MODIFIED = [
    *((name, {RECURRENCE: value}) for value in ("none", "detach") for name in having(RECURRENCE)),
    *((name, {RESIDUAL: 0.5}) for name in having(RESIDUAL) if get_router_type(name).replaces_hosts),
    *((name, {HEAD: value}) for value in HEAD.choices for name in having(HEAD)[:1]),
    *((name, {argument: value}) for argument in (SHARE_PROJECTOR, SHARE_HEAD) for value in ("2", "all")
      for name in having(argument)[:1]),
]  # fmt: skip


@pytest.mark.parametrize("name, options", MODIFIED, ids=lambda v: "-".join(map(str, getattr(v, "values", str)())))
def test_modifiers(name, options):
    made = model(name, options)
    read, found = routed(made)
    h, plain = None, []
    for router, x, logits in zip(routers(made), read, found, strict=True):
        expected, h = router.layer(x, h, made.model.shared_router)
        close(logits, expected, 1e-6)
        assert router.layer.config.options.items() >= {a.dest: v for a, v in options.items()}.items()
        plain.append(router.layer(x, None, made.model.shared_router)[0])
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(found, plain, strict=True)) == (h is not None)
    gradients(made.train(), output_router_logits=True)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("null_experts", [0, M])
def test_every_trained_parameter_has_a_gradient_and_no_other(name, null_experts):
    made = model(name, num_null_experts=null_experts).train()
    made.set_experts_implementation("grouped_mm")  # zeros for experts without a token
    frozen = {n for n, p in made.named_parameters() if not p.requires_grad}
    kind, routing = made.config.routing()
    own = {n for n, p in kind.layer(routing).named_parameters() if not p.requires_grad} if kind.layer else set()
    assert {n.rpartition(".layer.")[2] for n in frozen} == own
    assert any(g.abs().max() > 0 for n, g in gradients(made, output_router_logits=True).items() if ".router." in n) or (
        not kind.layer or not [p for p in kind.layer(routing).parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("name", having(SHARE_HEAD)[:1])
def test_layers_know_their_place(name):
    assert [router.layer.index for router in routers(model(name))] == [1, 2, 4]


def test_null_experts_take_their_part_of_a_token_away():
    """A token whose choices are all null ones gets the shared expert alone."""
    made = model(LINEAR, num_null_experts=M)
    block = made.model.layers[1].mlp
    x = torch.randn(3, 2, 32)
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.weight[block.router.config.num_experts :] = torch.randn(1, 32)
        x[:2] = block.router.weight[-1]  # null experts are the best, or the worst
        x[2:] = -block.router.weight[-1]
        y, _ = block(x, None, None)
        close(y[:2], block.shared_experts(x)[:2], 1e-6)
        assert (y - block.shared_experts(x))[2:].abs().max() > 1e-3
