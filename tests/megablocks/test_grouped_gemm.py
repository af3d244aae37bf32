"""The stand-in for grouped_gemm against one product a group in fp64."""

import pytest
import torch

from rmoe_megablocks.compat.megablocks import grouped_gemm

SIZES = {"mixed": [3, 0, 5, 1], "one expert takes all": [0, 9, 0, 0], "no tokens": [0, 0, 0, 0]}
# rows of whole 16 bytes go to grouped_mm, others through the loop
WIDTHS = {"aligned": (16, 8), "unaligned": (5, 7)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def operands(sizes, widths, dtype, trans_b=False, strided=False):
    torch.manual_seed(0)
    (k, n), groups, rows = widths, len(sizes), sum(sizes)
    a = torch.randn(k, rows).T if strided else torch.randn(rows, k)
    b = torch.randn(groups, n, k) if trans_b != strided else torch.randn(groups, k, n)
    b = b.mT if strided else b
    return a.to(dtype), b.to(dtype), torch.tensor(sizes)


def reference(a, b, sizes, trans_b):
    groups = a.split(sizes.tolist())
    return torch.cat([x @ (w.T if trans_b else w) for x, w in zip(groups, b, strict=True)])


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_and_gradients(dtype, widths, sizes, trans_b, strided):
    a, b, sizes = operands(sizes, widths, dtype, trans_b, strided)
    leaves = [a.requires_grad_(), b.requires_grad_()]
    out = grouped_gemm.ops.gmm(a, b, sizes, trans_b)
    weight = torch.randn(out.shape[1]).to(dtype).expand_as(out)  # an expanded gradient, as of a sum
    grads = torch.autograd.grad(out, leaves, weight)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference(*doubles, sizes, trans_b)
    expected_grads = torch.autograd.grad(expected, doubles, weight.double())
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("trans_a, trans_b", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_backend_writes_into_c(sizes, widths, trans_a, trans_b):
    a, b, sizes = operands(sizes, widths, torch.float32, trans_b)
    if trans_a:
        b = torch.randn(len(a), widths[1])
    expected = grouped_gemm.backend.gmm(a, b, sizes, trans_a, trans_b)
    if trans_a:
        products = [x.T @ y for x, y in zip(a.split(sizes.tolist()), b.split(sizes.tolist()), strict=True)]
        torch.testing.assert_close(expected, torch.stack(products), rtol=1e-5, atol=1e-5)  # empty groups are zeros
    c = torch.full_like(expected, float("nan"))
    assert grouped_gemm.backend.gmm(a, b, sizes, trans_a, trans_b, c=c) is c
    torch.testing.assert_close(c, expected, rtol=0, atol=0)


def test_only_needed_gradients_are_computed():
    a, b, sizes = operands([2, 3], (16, 8), torch.float32)
    grouped_gemm.ops.gmm(a, b.requires_grad_(), sizes).sum().backward()
    assert a.grad is None and b.grad is not None


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a, b, s: (a, b, s + 1), "sum up to 9"),
        (lambda a, b, s: (a, b.double(), s), "float64"),
        (lambda a, b, s: (a[:, 1:], b, s), "inner dimensions"),
        (lambda a, b, s: (a, b[1:], s), "one matrix a group"),
        (lambda a, b, s: (a, b, s.int()), "int64 vector"),
        (lambda a, b, s: (a[0], b, s), "number of dimensions"),
    ],
)
def test_wrong_operands_are_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        grouped_gemm.gmm(*change(*operands([2, 3, 0, 0], (16, 8), torch.float32)))
