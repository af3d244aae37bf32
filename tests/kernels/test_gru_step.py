"""The step in both forms, eager and as an operation, against the equations in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rmoe_megablocks.kernels import gru_arithmetic, gru_ops, gru_step
from tests.kernels.steps import NAMES, drawn, error, expected, results

P = 24


def recompute(*inputs):
    return gru_step(*inputs, recompute=True)


FORMS = {
    "eager": gru_step,
    "recompute": recompute,
    "op": lambda *inputs: gru_ops.gru_step(*inputs)[0],
    "recompute op": gru_ops.gru_recompute,
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("first", [False, True], ids=["h", "h0"])
@pytest.mark.parametrize("T", [0, 1, 7, 300])
def test_equals_the_equations(form, first, T):
    """300 rows are more than one block of the backward pass."""
    inputs, grad = drawn(T, P, first), torch.randn(T, P, dtype=torch.float64)
    for name, ours, theirs in zip(NAMES, results(FORMS[form], inputs, grad), expected(inputs, grad), strict=True):
        assert ours is theirs is None or error(ours, theirs) < 1e-14, name


@forms
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rounding(form, dtype, bound):
    inputs, grad = drawn(300, 64, dtype=dtype), torch.randn(300, 64).to(dtype)
    for name, ours, theirs in zip(NAMES, results(FORMS[form], inputs, grad), expected(inputs, grad), strict=True):
        assert ours.dtype == dtype and error(ours, theirs) < bound, name


@forms
@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_saturated_gates(form, scale):
    """Pre-activations of size 100 carry errors of 1e-5 already: no worse than three times the naive form in fp32."""
    from rmoe_megablocks.routing import reference

    inputs, grad = drawn(300, 64, dtype=torch.float32, scale=scale), torch.randn(300, 64)
    theirs = expected(inputs, grad)
    naive = results(reference.gru_step, inputs, grad)
    for name, mine, other, exact in zip(NAMES, results(FORMS[form], inputs, grad), naive, theirs, strict=True):
        assert torch.isfinite(mine).all() and error(mine, exact) <= 3 * error(other, exact) + 1e-6, name


@forms
@pytest.mark.parametrize("first", [False, True], ids=["h", "h0"])
def test_gradcheck(form, first):
    x, h, *weights = drawn(3, 4, first)
    if first:
        assert torch.autograd.gradcheck(lambda x, *weights: FORMS[form](x, None, *weights), (x, *weights))
    else:
        assert torch.autograd.gradcheck(FORMS[form], (x, h, *weights))


@pytest.mark.parametrize("op", [gru_ops.gru_step, gru_ops.gru_recompute], ids=["kept", "recompute"])
@pytest.mark.parametrize("first", [False, True], ids=["h", "h0"])
def test_opcheck(op, first):
    torch.library.opcheck(op, drawn(5, 8, first))


@forms
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(form, reentrant):
    """Two steps, the second from the first one's state: the same gradients as without recomputation."""
    first, second = drawn(9, P), drawn(9, P, seed=1)
    leaves = [first[0], *second]

    def run(x, x2, h, *weights):
        h = FORMS[form](x, h, *weights)
        return FORMS[form](x2, h, *weights)

    arguments = (leaves[0], *second)
    plain = torch.autograd.grad(run(*arguments).square().sum(), leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(run, *arguments, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


@forms
def test_autocast_changes_nothing(form):
    """Routing is computed in the dtype that its caller gives, whatever autocast would make of a matrix product."""
    inputs, grad = drawn(9, P, dtype=torch.float32), torch.randn(9, P)
    plain = results(FORMS[form], inputs, grad)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results(FORMS[form], inputs, grad)
    for name, ours, theirs in zip(NAMES, mixed, plain, strict=True):
        assert torch.equal(ours, theirs), name


def saved_values(step, inputs) -> int:
    """Elements that a step keeps for its backward pass: storages counted once, parameters left out, the state in."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage()._cdata, tensor), lambda tensor: tensor
    ):
        following = step(*inputs)
    for tensor in inputs[2:]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    kept[following.untyped_storage()._cdata] = following
    kept.pop(inputs[1].untyped_storage()._cdata, None)  # the previous step's state
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize(("form", "values"), [("eager", 6), ("recompute", 2), ("op", 6), ("recompute op", 2)])
def test_what_is_kept(form, values):
    assert saved_values(FORMS[form], drawn(11, P, dtype=torch.float32)) == values * 11 * P


def test_strided_and_further_dimensions():
    """A state that was transposed on its way, and [S, B, P] as Megatron has it."""
    x, h, *weights = drawn(12, P)
    x3, h3 = x.detach().view(3, 4, P).requires_grad_(), h.detach().view(4, 3, P).transpose(0, 1).requires_grad_()
    grad = torch.randn(3, 4, P, dtype=torch.float64)
    flat = [x3.detach().reshape(12, P), h3.detach().reshape(12, P), *weights]
    for form, step in FORMS.items():
        ours = results(step, [x3, h3, *weights], grad)
        for name, mine, other in zip(NAMES, ours, expected(flat, grad.view(12, P)), strict=True):
            assert error(mine.reshape(other.shape), other) < 1e-14, (form, name)


@pytest.mark.parametrize("sign", ["to_n", "to_z", "to_s"])
def test_a_wrong_gradient_is_seen(monkeypatch, sign):
    """The comparison above notices each of the three gates' gradients."""
    exact = gru_arithmetic._pointwise
    columns = {"to_n": 0, "to_s": 1, "to_z": 2}[sign]

    def wrong(grad, h, gates, recurrent_n, buffer, grad_h):
        exact(grad, h, gates, recurrent_n, buffer, grad_h)
        buffer[:, columns * P : (columns + 1) * P] *= 1.001

    monkeypatch.setattr(gru_arithmetic, "_pointwise", wrong)
    inputs, grad = drawn(7, P), torch.randn(7, P, dtype=torch.float64)
    errors = [error(a, b) for a, b in zip(results(gru_step, inputs, grad), expected(inputs, grad), strict=True)]
    assert max(errors) > 1e-4
