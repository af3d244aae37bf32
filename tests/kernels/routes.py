"""One routing step, GRU and router matrix, in every mix of dtypes that the kernels take, against float64."""

import torch

from rmoe_megablocks.kernels import gru_route
from rmoe_megablocks.routing import reference
from tests.kernels.steps import error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# mode: dtype of x and h, dtype whose values the parameters have, bounds of outputs and of gradients
MODES = {
    "bf16": (BF16, BF16, 5e-3, 5e-3),
    "fp16": (FP16, FP16, 1e-3, 1e-3),
    "fp32": (FP32, FP32, 1e-5, 1e-5),
    "split": (FP32, BF16, 1e-5, 5e-3),
}
NAMES = (
    "logits", "h'", "grad x", "grad h", "grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh",
    "grad router", "grad router_bias",
)  # fmt: skip


def drawn(
    mode: str, T: int, P: int, E: int | None, first=False, bias=True, scale: float = 1.0, device: str = "cpu"
) -> list:
    """Leaves: x, h, the cell's four (in x's dtype, with the values of the mode), router and its bias."""
    torch.manual_seed(T + P)
    dtype, values, *_ = MODES[mode]
    shapes = [(T, P), (T, P), (3 * P, P), (3 * P, P), (3 * P,), (3 * P,), (E or 1, P), (E or 1,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[1].tanh_()
    for i in (2, 3, 6):
        tensors[i] *= scale / P**0.5
    tensors = [t.to(dtype) if i < 2 else t.to(values) for i, t in enumerate(tensors)]
    tensors = [t.to(dtype) if i < 6 else t for i, t in enumerate(tensors)]
    tensors = [t.to(device).requires_grad_() for t in tensors]
    if first:
        tensors[1] = None
    if E is None:
        tensors[6] = None
    if E is None or not bias:
        tensors[7] = None
    return tensors


def results(step, inputs, grads) -> list:
    leaves = [t for t in inputs if t is not None]
    logits, following = step(*inputs)
    outputs = [logits, following] if inputs[6] is not None else [following]
    grads = [g.to(o.dtype) for g, o in zip(grads[-len(outputs) :], outputs, strict=True)]
    found = iter(torch.autograd.grad(outputs, leaves, grads))
    return [logits.detach(), following.detach(), *(None if t is None else next(found) for t in inputs)]


def equations(x, h, w_ih, w_hh, b_ih, b_hh, router, router_bias):
    h = reference.gru_step(x, torch.zeros_like(x) if h is None else h, w_ih, w_hh, b_ih, b_hh)
    if router is None:
        return h.new_empty(0), h
    logits = h @ router.T
    return logits if router_bias is None else logits + router_bias, h


def compare(mode: str, T: int, P: int, E: int | None, first=False, bias=True, step=None, device="cpu"):
    dtype, values, bound, bound_grad = MODES[mode]
    inputs = drawn(mode, T, P, E, first, bias, device=device)
    # gradients that the dtype holds exactly: their rounding is not what is measured
    grads = [torch.randn(T, E or 1).to(device, values), torch.randn(T, P).to(device, values)]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    theirs = results(equations, doubles, [g.double() for g in grads])
    ours = results(step or (lambda *i: gru_route(*i, bf16_weights=mode == "split")), inputs, grads)
    for i, (name, mine, other) in enumerate(zip(NAMES, ours, theirs, strict=True)):
        if other is None:
            assert mine is None, name
            continue
        assert torch.isfinite(mine).all(), name
        assert i < 2 or mine.dtype == inputs[i - 2].dtype, name
        found = error(mine, other)
        assert found <= (bound if i < 2 else bound_grad), f"{name}: {found:.2e}"
