"""The router on fake CUDA tensors: no operand on another device, no value read on the host. Needs no GPU.

python -m tests.routing.fake_gpu, from test_implementation.py, in a process of its own: CPU mode makes torch take "cuda"
for the CPU.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rmoe_megablocks.kernels import linear_in_dtype
from rmoe_megablocks.routing import RoutingConfig, get_router_type
from rmoe_megablocks.routing.parts.implementation import CHOICES

BF16, FP32 = torch.bfloat16, torch.float32
T, H, P, E = 6, 20, 8, 4


@contextlib.contextmanager
def fake_gpu(dtype: torch.dtype = BF16):
    """New tensors are on a GPU that is not there, new parameters in ``dtype``: fake ones cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(before)


def stack(impl: str, dtype: torch.dtype = FP32, fault=lambda h: h, **options) -> list[torch.Tensor]:
    """Logits of three bf16 layers and the last state, routed in ``dtype``; ``fault`` happens to every state."""
    options |= {"moe_router_impl": impl, "moe_router_rnn_hidden_size": P}
    config, gru = RoutingConfig(H, E, options), get_router_type("gru")
    with fake_gpu():
        layers, cell = [gru.build_layer(config) for _ in range(3)], gru.build_shared(config)
        h, values = None, []
        for layer in layers:
            logits, h = layer(torch.randn(T, H, dtype=BF16), h, cell, dtype)
            values.append(logits)
            h = fault(h)
    return [*values, h]


def check_stacks() -> int:
    """Every form and head, in both dtypes of routing."""
    count = 0
    for impl in CHOICES:
        for dtype, head in ((FP32, "linear"), (FP32, "cosine"), (BF16, "linear")):
            values = stack(impl, dtype, moe_router_head=head)
            assert {(value.dtype, value.device.type) for value in values} == {(dtype, "cuda")}
            assert [value.shape for value in values] == [(T, E)] * 3 + [(T, P)]
            count += 1
    return count


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def check_products() -> int:
    """A bf16 product in fp32 is torch's mm with an fp32 result: the operands stay in bf16."""
    for bias in (None, torch.zeros(P, dtype=BF16)):
        with fake_gpu(), _Called() as called:
            x, weight = torch.randn(2, T, H), torch.randn(P, H)
            called.names.clear()
            result = linear_in_dtype(x, weight, None if bias is None else torch.randn(P), FP32)
        assert result.dtype == FP32 and result.shape == (2, T, P)
        assert "aten.mm.dtype" in called.names and not {"aten.mm.default", "aten.addmm.default"} & set(called.names)
    return 2


def check_faults() -> int:
    """A value read on the host and a state on the CPU, planted, stop the run above."""

    def read(h):
        return h * h.sum().item()

    def move(h):
        return torch.zeros(h.shape, dtype=h.dtype, device="cpu")

    for fault, error in ((read, DataDependentOutputException), (move, ValueError)):
        try:
            stack("eager", fault=fault)
        except error:
            continue
        raise AssertionError(f"{fault.__name__} was not noticed")
    return 2


if __name__ == "__main__":
    print(f"{check_stacks()} stacks, {check_products()} products, {check_faults()} faults seen")
