"""MegaBlocks' permutations with the CPU code under them, against loops over tokens; forward and backward."""

import pytest
import torch

from rmoe_megablocks.compat import megablocks as megablocks_compat

megablocks_compat.enable()

from megablocks import ops  # noqa: E402
from megablocks.backend import kernels  # noqa: E402

EXPERTS, HIDDEN, BLOCK = 4, 6, 8
ROUTINGS = {
    "mixed": [[2, 0], [0, 3], [2, 3], [0, 2], [3, 0]],  # expert 1 gets nothing
    "one expert takes all": [[1], [1], [1]],
    "no tokens": torch.empty(0, 2, dtype=torch.int32).tolist(),
    "no tokens, top-1": [],
}
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2e-2}

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.parametrize("name", ROUTINGS),
    pytest.mark.parametrize("weighted", [False, True]),
    pytest.mark.parametrize("strided", [False, True]),
]


class Case:
    """A routing with everything MegaBlocks derives from it, and the place of each copy by plain loops."""

    def __init__(self, name, dtype, weighted, strided):
        torch.manual_seed(0)
        experts = ROUTINGS[name]
        self.top_k = 1 if name.endswith(("top-1", "all")) else 2
        self.tokens = len(experts)
        self.flat = [e for row in experts for e in row]
        copies = len(self.flat)
        top_experts = torch.tensor(self.flat, dtype=torch.int32)
        self.bin_ids, self.indices = ops.sort(top_experts, 2)
        counts = ops.histogram(top_experts, EXPERTS)
        self.bins = ops.inclusive_cumsum(counts, 0)
        self.padded_bins = ops.inclusive_cumsum(ops.round_up(counts, BLOCK), 0)
        self.dtype, self.tolerance = dtype, DTYPES[dtype]
        make = (lambda r, c: torch.randn(c, r).T) if strided else torch.randn
        self.make = lambda r, c: make(r, c).to(dtype).requires_grad_()
        self.weights = torch.rand(copies).to(dtype).requires_grad_() if weighted else None
        order = sorted(range(copies), key=self.flat.__getitem__)
        self.row = {copy: row for row, copy in enumerate(order)}
        first = {e: min((self.row[c] for c in range(copies) if self.flat[c] == e), default=0) for e in range(EXPERTS)}
        starts = [0, *self.padded_bins.tolist()]
        self.entry = {c: self.row[c] - first[self.flat[c]] for c in range(copies)}
        self.padded_row = {c: starts[self.flat[c]] + self.entry[c] for c in range(copies)}

    def expected_scatter(self, rows):
        """The sum of each token's copies; ``rows`` maps a copy to its row or None."""
        weights = [1.0] * len(self.flat) if self.weights is None else list(self.weights.double())
        total = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in range(self.tokens)]
        for copy in range(len(self.flat)):
            row = rows(copy)
            if row is not None:
                total[copy // self.top_k] = total[copy // self.top_k] + row.double() * weights[copy]
        return torch.stack(total) if total else torch.zeros(0, HIDDEN, dtype=torch.float64)

    def compare(self, ours, theirs, leaves):
        """Results, and gradients for a fixed random weighting of them."""
        assert ours.dtype == self.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=self.tolerance, atol=self.tolerance)
        if not theirs.requires_grad:
            return
        leaves = [leaf for leaf in leaves if leaf is not None]
        weight = torch.randn(ours.shape).to(self.dtype)
        grads = torch.autograd.grad(ours, leaves, weight)
        expected = torch.autograd.grad(theirs, leaves, weight.double(), allow_unused=True)
        for grad, other in zip(grads, expected, strict=True):
            other = torch.zeros_like(grad) if other is None else other
            torch.testing.assert_close(grad, other, rtol=4 * self.tolerance, atol=4 * self.tolerance)


def test_gather(name, dtype, weighted, strided):
    case = Case(name, dtype, False, strided)
    x = case.make(case.tokens, HIDDEN)
    out = ops.gather(x, case.indices, case.bin_ids, case.bins, case.top_k)
    expected = x.double()[[copy // case.top_k for copy in sorted(case.row, key=case.row.get)]]
    case.compare(out, expected, [x])


def test_scatter(name, dtype, weighted, strided):
    case = Case(name, dtype, weighted, strided)
    x = case.make(len(case.flat), HIDDEN)
    out = ops.scatter(x, case.indices, case.bin_ids, case.weights, case.bins, case.top_k)
    case.compare(out, case.expected_scatter(lambda c: x[case.row[c]]), [x, case.weights])


def test_padded_gather(name, dtype, weighted, strided):
    case = Case(name, dtype, False, strided)
    x = case.make(case.tokens, HIDDEN)
    out = ops.padded_gather(x, case.indices, case.bin_ids, case.bins, case.padded_bins, case.top_k)
    rows = [torch.zeros(HIDDEN, dtype=torch.float64)] * int(case.padded_bins[-1])
    for copy, row in case.padded_row.items():
        rows[row] = x[copy // case.top_k].double()
    case.compare(out, torch.stack(rows) if rows else torch.zeros(0, HIDDEN, dtype=torch.float64), [x])


def test_padded_scatter(name, dtype, weighted, strided):
    case = Case(name, dtype, weighted, strided)
    x = case.make(int(case.padded_bins[-1]), HIDDEN)
    out = ops.padded_scatter(x, case.indices, case.bin_ids, case.weights, case.bins, case.padded_bins, case.top_k)
    case.compare(out, case.expected_scatter(lambda c: x[case.padded_row[c]]), [x, case.weights])


@pytest.mark.parametrize("capacity", [1, 4])
def test_binned_gather(name, dtype, weighted, strided, capacity):
    case = Case(name, dtype, False, strided)
    x = case.make(case.tokens, HIDDEN)
    out = ops.binned_gather(x, case.indices, case.bins, capacity, case.top_k)
    rows = [[torch.zeros(HIDDEN, dtype=torch.float64)] * capacity for _ in range(EXPERTS)]
    for copy, entry in case.entry.items():
        if entry < capacity:
            rows[case.flat[copy]][entry] = x[copy // case.top_k].double()
    case.compare(out, torch.stack([torch.stack(row) for row in rows]), [x])


@pytest.mark.parametrize("capacity", [1, 4])
def test_binned_scatter(name, dtype, weighted, strided, capacity):
    case = Case(name, dtype, weighted, strided)
    x = case.make(EXPERTS * capacity, HIDDEN)
    grid = x.reshape(EXPERTS, capacity, HIDDEN)
    out = ops.binned_scatter(grid, case.indices, case.weights, case.bins, case.top_k)
    kept = lambda c: grid[case.flat[c], case.entry[c]] if case.entry[c] < capacity else None  # noqa: E731
    case.compare(out, case.expected_scatter(kept), [x, case.weights])


def test_wrong_shapes_are_refused(name, dtype, weighted, strided):
    case = Case(name, dtype, weighted, strided)
    with pytest.raises(ValueError, match="matrix"):
        kernels.gather(torch.zeros(3), case.indices, case.bin_ids, None, case.bins, case.top_k)
    with pytest.raises(ValueError, match="rows"):
        kernels.gather(torch.zeros(9, 2), case.indices, case.bin_ids, None, case.bins, case.top_k)
