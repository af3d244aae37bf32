"""In which dtype routing is computed: --moe-router-dtype's, in bf16 models and under autocast."""

import pytest
import torch

from tests.huggingface.built import TYPES, close, model, routers, tokens


def recorded(made):
    """Logits of all layers, and the dtypes of the states."""
    states = []
    hooks = [r.register_forward_hook(lambda _, args, out: states.append(out[3])) for r in routers(made)]
    out = made(tokens(), output_router_logits=True)
    for hook in hooks:
        hook.remove()
    return out, {h.dtype for h in states if h is not None}


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_bf16_with_a_router_in_fp32(name):
    made = model(name, router_dtype="float32").to(torch.bfloat16)
    read = []
    routers(made)[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    out, states = recorded(made)
    assert out.logits.dtype == torch.bfloat16 and states <= {torch.float32}
    assert {x.dtype for x in out.router_logits} == {torch.float32}
    exact = model(name, router_dtype="float32").to(torch.bfloat16).float()  # the rounded weights
    expected = routers(exact)[0](read[0].float(), None, exact.model.shared_router)[0]
    close(out.router_logits[0], expected, 2e-5)
    plain, states = recorded(model(name).to(torch.bfloat16))
    assert {x.dtype for x in plain.router_logits} | states == {torch.bfloat16}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [None, "float32"])
@torch.no_grad()
def test_autocast_does_not_reach_the_router(name, dtype):
    made = model(name, router_dtype=dtype)
    read = []
    routers(made)[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out, states = recorded(made)
    assert out.logits.dtype == torch.bfloat16 and states <= {torch.float32}
    close(out.router_logits[0], routers(made)[0](read[0].float(), None, made.model.shared_router)[0], 1e-6)


def test_fp64():
    out, states = recorded(model(router_dtype="float64"))
    assert {x.dtype for x in out.router_logits} == states == {torch.float64} and out.logits.dtype == torch.float32
