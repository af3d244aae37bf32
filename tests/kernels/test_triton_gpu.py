"""The Triton kernels on a GPU against float64: tests/kernels/interpreted/cases.py has the small sizes."""

import pytest
import torch

from tests.kernels.routes import MODES, compare, drawn, results

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("first", [False, True], ids=["h", "h0"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("T", "P", "E"),
    [(4096, 128, 16), (4097, 128, 64), (1000, 96, 200), (513, 256, 16), (65, 24, 5), (1, 16, 2), (0, 64, 8)],
)
def test_equals_the_equations(mode, T, P, E, first):
    compare(mode, T, P, E, first, device="cuda")


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_equal(mode):
    from rmoe_megablocks.kernels import gru_route

    inputs = drawn(mode, 5000, 128, 16, device="cuda")
    grads = [torch.randn(5000, 16, device="cuda"), torch.randn(5000, 128, device="cuda")]
    runs = [results(lambda *i: gru_route(*i, bf16_weights=mode == "split"), inputs, grads) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
