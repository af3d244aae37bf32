"""The Triton kernels under the repaired interpreter; tests/kernels/test_triton.py runs this file in a process."""

from tests.kernels.interpreted import repairs  # isort: skip  before any kernel

import itertools
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from rmoe_megablocks.kernels import gru_arithmetic
from rmoe_megablocks.kernels.gru_route import gru_route, gru_route_op
from rmoe_megablocks.kernels.triton import fused, launch
from tests.kernels.routes import MODES, NAMES, compare, drawn, equations, results
from tests.kernels.steps import error

repairs.install()
assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("first", [False, True], ids=["h", "h0"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_equations(mode, first):
    """70 tokens are a full tile and a tail."""
    compare(mode, 70, 32, 8, first)


@pytest.mark.parametrize(
    ("mode", "T", "P", "E"),
    [
        ("bf16", 0, 32, 8),
        ("bf16", 1, 32, 8),
        ("split", 0, 32, 8),
        ("split", 1, 24, 5),
        ("split", 65, 48, 17),
        ("bf16", 65, 24, 3),
        ("fp32", 0, 24, 8),
        ("fp32", 1, 24, 8),
        ("fp32", 17, 48, 8),
        ("split", 20, 128, 16),
        ("bf16", 20, 128, 16),
        ("bf16", 3, 256, 8),  # by cuBLAS's products
        ("split", 3, 136, 8),
        ("bf16", 3, 32, 72),  # logits by cuBLAS
        ("split", 3, 32, 72),
        ("split", 5, 32, None),  # another head than a matrix
        ("fp32", 5, 8, None),
    ],
)
def test_sizes(mode, T, P, E):
    compare(mode, T, P, E)


def test_without_a_bias_and_with_further_dimensions():
    compare("split", 6, 32, 8, bias=False)
    inputs = drawn("split", 6, 32, 8)
    x, h = (t.detach().view(2, 3, 32).transpose(0, 1) for t in inputs[:2])
    logits, following = gru_route(x, h, *inputs[2:], bf16_weights=True)
    assert logits.shape == (3, 2, 8) and following.shape == (3, 2, 32)
    flat = gru_route(x.reshape(6, 32), h.reshape(6, 32), *inputs[2:], bf16_weights=True)
    assert torch.equal(logits.view(6, 8), flat[0]) and torch.equal(following.view(6, 32), flat[1])


@pytest.mark.parametrize("scale", [10.0, 30.0])
@pytest.mark.parametrize("mode", ["fp32", "split"])
def test_saturated_gates(mode, scale):
    """No worse than three times what fp32 loses. Split keeps 16 bits of pre-activations and 8 of gradients."""
    inputs = drawn(mode, 20, 32, 8, scale=scale)
    grads = [torch.randn(20, 8), torch.randn(20, 32)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    singles = [t.detach().float().requires_grad_() for t in inputs]
    theirs, naive = results(equations, doubles, grads), results(equations, singles, grads)
    ours = results(lambda *i: gru_route(*i, bf16_weights=mode == "split"), inputs, grads)
    for i, (name, mine, other, exact) in enumerate(zip(NAMES, ours, naive, theirs, strict=True)):
        bound = 3 * error(other, exact) + 1e-6 if mode == "fp32" else 2e-5 if i < 2 else 5e-3
        assert torch.isfinite(mine).all() and error(mine, exact) <= bound, name


def test_two_runs_are_equal():
    inputs, grads = drawn("split", 70, 16, 8), [torch.randn(70, 8), torch.randn(70, 16)]
    runs = [results(lambda *i: gru_route(*i, bf16_weights=True), inputs, grads) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("mode", "E", "first"), [("split", 4, False), ("bf16", None, True), ("fp32", 4, False)])
def test_the_operation(mode, E, first):
    compare(mode, 3, 16, E, first, step=lambda *i: gru_route_op(*i, mode == "split")[:2])
    torch.library.opcheck(
        gru_route_op,
        (*drawn(mode, 3, 16, E, first), mode == "split"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_in_one_graph():
    inputs = drawn("split", 3, 16, 4)
    grads = [torch.randn(3, 4), torch.randn(3, 16)]
    compiled = torch.compile(gru_route, fullgraph=True, backend="aot_eager")
    ours, theirs = (results(lambda *i, s=s: s(*i, True), inputs, grads) for s in (compiled, gru_route))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_kept():
    """x' and the new state, which is the next layer's h."""
    for mode, size in (("split", 4), ("fp32", 4), ("bf16", 2)):
        inputs, kept = drawn(mode, 5, 16, 4), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
        ):
            _, following = gru_route(*inputs, bf16_weights=mode == "split")
        for t in inputs[1:]:
            kept.pop(t.untyped_storage()._cdata, None)
        of_tokens = [t for t in kept.values() if t.shape == (5, 16)]
        assert sum(t.untyped_storage().nbytes() for t in of_tokens) == 5 * 16 * 2 * size


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    inputs, grads = drawn("split", 5, 16, 4), [torch.randn(5, 4), torch.randn(5, 16)]
    plain = results(lambda *i: gru_route(*i, bf16_weights=True), inputs, grads)
    for t in inputs:
        t.grad = None
    outputs = torch.utils.checkpoint.checkpoint(
        lambda *i: gru_route(*i, bf16_weights=True), *inputs, use_reentrant=reentrant
    )
    torch.autograd.backward(outputs, grads)
    for t, expected in zip(inputs, plain[2:], strict=True):
        assert torch.equal(t.grad, expected)


# What the comparisons above must notice, planted.


def test_a_swap_of_gates_is_seen(monkeypatch):
    inputs = launch.forward

    def swapped(x, h, weights, *rest):
        w_ih, *others = weights
        P = w_ih.shape[1]
        return inputs(x, h, (torch.cat((w_ih[P : 2 * P], w_ih[:P], w_ih[2 * P :])), *others), *rest)

    monkeypatch.setattr(launch, "forward", swapped)
    with pytest.raises(AssertionError, match="logits"):
        compare("split", 3, 16, 4)


@pytest.mark.parametrize("columns", list(itertools.combinations(range(4), 2)))
def test_a_swap_of_gradients_is_seen(monkeypatch, columns):
    exact = gru_arithmetic.bias_sums
    i, j = columns

    def swapped(sums):
        blocks = list(sums.chunk(4))
        blocks[i], blocks[j] = blocks[j], blocks[i]
        return exact(torch.cat(blocks))

    monkeypatch.setattr(gru_arithmetic, "bias_sums", swapped)
    with pytest.raises(AssertionError, match="grad bias"):
        compare("fp32", 3, 16, 4)


@pytest.mark.parametrize("which", ["load", "store"])
def test_an_access_behind_the_end_is_seen(which):
    """The kernel is told of one token more than there are."""
    x, h = torch.randn(4, 16), torch.randn(4, 16)
    weights = [torch.randn(48, 16).bfloat16(), torch.randn(48, 16).bfloat16(), torch.randn(48), torch.randn(48)]
    longer = torch.empty(5, 16)
    ins = (x, h) if which == "load" else (longer, longer.clone())
    following = longer if which == "load" else torch.empty(4, 16)
    with pytest.raises(Exception, match="outside every tensor"):
        fused.forward[(1,)](
            *ins, *weights, None, None, following.clone(), None, 5, 16, 16, 16, 16, 16, 16,
            True, False, False, True,
        )  # fmt: skip


@triton.jit
def _reads_only(x_ptr, next_ptr):
    tl.store(next_ptr, 1.0)
    tl.store(x_ptr, 1.0)


def test_a_store_into_an_input_is_seen():
    with pytest.raises(Exception, match="outside every tensor"):
        _reads_only[(1,)](torch.zeros(1), torch.zeros(1))


def test_the_repairs_themselves():
    values = torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    bits = repairs.to_bf16(values.numpy())
    assert np.array_equal(bits, values.bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(repairs.from_bf16(bits), values.bfloat16().float().numpy())
    assert 0 < np.abs(repairs.to_tf32(values.numpy()) / values.numpy() - 1).max() <= 2**-11


def test_tanh_near_zero():
    assert fused.tanh is not None
    points = torch.cat((torch.logspace(-6, 2, 64), -torch.logspace(-6, 2, 64)))
    following = torch.empty(128)
    _tanh_of[(1,)](points, following)
    torch.testing.assert_close(following.double(), points.double().tanh(), rtol=3e-7, atol=0)


@triton.jit
def _tanh_of(x_ptr, next_ptr):
    at = tl.arange(0, 128)
    tl.store(next_ptr + at, fused.tanh(tl.load(x_ptr + at)))
