"""Every routing parameter's gradient, element by element, is one process's."""

import pytest
import torch

from tests.distributed import cases, further_cases, grid
from tests.distributed.arguments import BASE

COMPARED = {case.name: case for case in cases.selected()}
# every layer's projector and router, and the four of the GRU
ROUTING = ("rnn_router.", "routing_layer.projector", "routing_layer.router")


def routing_gradients(results: list[dict]):
    """(rank, name, gradient) of every routing parameter that a rank holds."""
    for rank, result in enumerate(results):
        for name, gradient in result["gradients"].items():
            if any(part in name for part in ROUTING):
                yield rank, name, gradient


def largest_error(lab, name: str, reference: str) -> tuple[float, set[str]]:
    """Of all elements, relative to the largest of their parameter's gradient; and the names of the parameters."""
    (one,) = lab.results[reference]
    worst, names = 0.0, set()
    for _, parameter, gradient in routing_gradients(lab.results[name]):
        expected = one["gradients"][parameter]
        assert gradient.dtype == expected.dtype == torch.float32 and gradient.shape == expected.shape
        assert expected.abs().amax() > 1e-4 and gradient.isfinite().all(), parameter  # a maximum may pass over a NaN
        worst = max(worst, ((gradient - expected).abs().amax() / expected.abs().amax()).item())
        names.add(parameter)
    return worst, names


@pytest.mark.parametrize("layout", grid.GRADIENTS)
@pytest.mark.parametrize("mode", ["fp32", "fp32, full recompute"])
def test_routing_gradients_are_one_processs(lab, layout, mode):
    case = COMPARED[f"{layout} @ {mode}"]
    worst, names = largest_error(lab, case.name, case.reference)
    own = 4 if "--moe-router-rnn-bias" in BASE else 2
    assert len(names) == 4 + own * (8 if "eight layers" in case.shape else 4)
    assert worst < 1e-5


@pytest.mark.parametrize("fault", further_cases.FAULTS)
def test_a_fault_is_noticed(lab, fault):
    worst, _ = largest_error(lab, f"fault: {fault}", "base @ fp32")
    assert worst > 1e-3
