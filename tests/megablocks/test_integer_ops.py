"""The stand-ins for megablocks_ops against loops over Python numbers."""

import pytest
import torch

from rmoe_megablocks.compat.megablocks import integer_ops as ops

INTEGERS = [torch.int16, torch.int32, torch.int64]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), -1, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("values", [[], [3], [2, 0, 3, 2, 1, 0, 3, 3], [1] * 6])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided])
def test_sort_is_stable_and_says_where_values_were(dtype, values, layout):
    x = layout(torch.tensor(values, dtype=dtype))
    out, iota = torch.full((2, len(values)), 99, dtype=dtype)
    ops.sort(x, 2, out, iota)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert iota.tolist() == order
    assert out.tolist() == [values[i] for i in order]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_sort_looks_at_the_low_bits_only(dtype):
    x = torch.tensor([5, 2, 4, 1], dtype=dtype)  # low two bits: 1, 2, 0, 1
    out, iota = torch.empty(2, 4, dtype=dtype)
    ops.sort(x, 2, out, iota)
    assert out.tolist() == [4, 5, 1, 2]
    ops.sort(torch.tensor([1, -2, 3, -4], dtype=dtype), dtype.itemsize * 8, out, iota)
    assert out.tolist() == [-4, -2, 1, 3]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided])
def test_histogram_counts_what_is_in_range(dtype, layout):
    rows = [[0, 1, 1, 7, -1, 3], [2, 2, 2, 2, 2, 2]]
    expected = [[row.count(i) for i in range(4)] for row in rows]
    both = ops.histogram(layout(torch.tensor(rows, dtype=dtype)), 4)
    assert both.dtype == torch.int32 and both.tolist() == expected
    one = ops.histogram(layout(torch.tensor(rows[0], dtype=dtype)), 4)
    assert one.dtype == torch.int32 and one.tolist() == expected[0]
    assert ops.histogram(torch.empty(0, dtype=dtype), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided])
def test_cumsums_go_in_place_along_rows(dtype, layout):
    rows = [[3, 0, 2], [1, 1, 1]]
    x, out = layout(torch.tensor(rows, dtype=dtype)), torch.empty(2, 3, dtype=dtype)
    ops.inclusive_cumsum(x, 1, out)
    assert out.tolist() == [[3, 3, 5], [1, 2, 3]]
    ops.exclusive_cumsum(x, 1, out)
    assert out.tolist() == [[0, 3, 3], [0, 1, 2]]
    empty = torch.empty(1, 0, dtype=dtype)
    ops.inclusive_cumsum(empty, 1, empty)


def test_indices_of_the_block_sparse_matrix():
    bins, block, columns = [0, 256, 256, 384], 128, 3  # two experts without rows
    out = torch.empty(3 * columns, dtype=torch.int16)
    ops.indices(torch.tensor(bins, dtype=torch.int32), block, 3, columns, out)
    assert out.view(3, columns).tolist() == [[3, 4, 5], [3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 5, 0], [0, 0, 0]])
def test_replicate_and_its_segment_sums(dtype, sizes):
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    bins = torch.tensor(sizes).cumsum(0).int()
    out = torch.empty(2, sum(sizes), dtype=dtype)
    ops.replicate_forward(x, bins, out)
    expected = [[v for v, n in zip(row, sizes, strict=True) for _ in range(n)] for row in x.tolist()]
    assert out.tolist() == expected
    sums = torch.empty(2, 3, dtype=dtype)
    ops.replicate_backward(out, bins, sums)
    assert sums.tolist() == [[v * n for v, n in zip(row, sizes, strict=True)] for row in x.tolist()]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.sort(torch.zeros(2, 2, dtype=torch.int32), 2, *torch.zeros(2, 2, 2, dtype=torch.int32)),
        lambda: ops.sort(torch.zeros(2), 2, torch.zeros(2), torch.zeros(2)),
        lambda: ops.inclusive_cumsum(torch.zeros(2, 2, dtype=torch.int32), 0, torch.zeros(2, 2, dtype=torch.int32)),
        lambda: ops.histogram(torch.zeros(1, 1, 1, dtype=torch.int32), 2),
    ],
)
def test_wrong_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
