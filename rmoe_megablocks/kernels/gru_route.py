"""GRU step and router matrix in one operation, by Triton: x' and h are kept for the backward pass, nothing else."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmoe_megablocks.kernels import gru_arithmetic
from rmoe_megablocks.kernels.products import LOW, addmm_fp32, mm_fp32
from rmoe_megablocks.kernels.triton.tables import LARGEST_SIZE

_NEEDED = (8, 0)  # compute capability, for bf16 and enough shared memory
_FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on the CPU


def why_not(device: torch.device, dtype: torch.dtype, parameters: torch.dtype, size: int, experts: int) -> str | None:
    """Why no kernel runs for a state of ``size`` in ``dtype`` over ``parameters`` of a dtype; None if one does.

    The meta device, on which sizes are measured, counts as a GPU.
    """
    if device.type not in ("cuda", "meta") and not INTERPRETED:
        return f"it needs a CUDA GPU, and runs on {device.type}"
    if device.type != "meta" and not _FOUND:
        return "Triton is not installed"
    if device.type == "cuda" and _is_real() and torch.cuda.get_device_capability(device) < _NEEDED:
        return f"the GPU's compute capability is below {'.'.join(map(str, _NEEDED))}"
    if dtype not in (torch.float32, *LOW) or parameters not in (torch.float32, *LOW):
        return f"it takes fp32, bf16 and fp16, not {dtype} over {parameters}"
    if max(size, experts) > LARGEST_SIZE:
        return f"it takes a state and experts of at most {LARGEST_SIZE}, not {size} and {experts}"
    return None


def gru_route(
    x: Tensor,
    h: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    router: Tensor | None = None,
    router_bias: Tensor | None = None,
    bf16_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits [..., E] and the next state [..., P] in the dtype of x; without a router, logits of no elements.

    Args:
        x, h: [..., P], h None for h_0 = 0.
        weight_ih, weight_hh, bias_ih, bias_hh: GRUCell's, in the dtype of x.
        router, router_bias: of the layer, [E, P] and [E] or None, in any dtype.
        bf16_weights: the fp32 matrices hold bf16 values: products then run on tensor cores, see :mod:`.triton.launch`.
    """
    arguments = (x, h, weight_ih, weight_hh, bias_ih, bias_hh, router, router_bias, bf16_weights)
    if torch.compiler.is_compiling():
        return gru_route_op(*arguments)[:2]
    return _GRURoute.apply(*arguments)


def _operands(x: Tensor, bf16_weights: bool) -> torch.dtype:
    return torch.bfloat16 if bf16_weights and x.dtype == torch.float32 else x.dtype


def _forward(x, h, w_ih, w_hh, b_ih, b_hh, router, router_bias, bf16_weights):
    """Logits, h', and the matrices in the dtype of the products."""
    size, shape = x.shape[-1], x.shape
    x = x.reshape(-1, size).contiguous()
    h = None if h is None else h.reshape(-1, size).contiguous()
    operands = _operands(x, bf16_weights)
    with gru_arithmetic.exact_dtypes(x):
        weights = (w_ih.to(operands), w_hh.to(operands), b_ih, b_hh)
        router = None if router is None else router.to(operands)
        router_bias = None if router is None or router_bias is None else router_bias.to(operands)
        if _runs(x):
            from rmoe_megablocks.kernels.triton import launch

            following, logits = launch.forward(x, h, weights, router, router_bias)
        else:
            following, logits = _shapes(x, h, weights, router)
    logits = x.new_empty(0) if logits is None else logits.view(*shape[:-1], logits.shape[-1])
    return logits, following.view(shape), weights[:2]


def _backward(grad_logits, grad, x, h, following, w_ih, w_hh, b_ih, b_hh, router, router_bias):
    """Gradients of x, h, the four parameters, router and router bias."""
    size, shape = grad.shape[-1], grad.shape
    grad, x = (v.reshape(-1, size).contiguous() for v in (grad, x))
    h = None if h is None else h.reshape(-1, size).contiguous()
    grad_router = grad_router_bias = None
    with gru_arithmetic.exact_dtypes(grad):
        if router is not None:
            grad_TE = grad_logits.reshape(-1, len(router))
            if router_bias is not None:
                grad_router_bias = grad_TE.sum(0).to(router_bias.dtype)
            matrix = router.to(w_ih.dtype)
            low_TE = grad_TE.to(w_ih.dtype)
            grad_router = mm_fp32(low_TE.mT, following.reshape(-1, size).to(w_ih.dtype)).to(router.dtype)
            if grad.dtype == torch.float32:
                grad = addmm_fp32(grad, low_TE, matrix)
            else:
                grad = torch.addmm(grad, low_TE, matrix)
        if _runs(grad):
            from rmoe_megablocks.kernels.triton import launch

            grads = launch.backward(grad, x, h, (w_ih, w_hh, b_ih, b_hh))
        else:
            full = [weight.to(grad.dtype) for weight in (w_ih, w_hh)]
            grads = gru_arithmetic.backward(grad, x, h, None, None, *full, b_ih, b_hh)
    grad_x, grad_h, *others = grads
    grad_h = None if grad_h is None else grad_h.view(shape)
    return grad_x.view(shape), grad_h, *others, grad_router, grad_router_bias


def _shapes(x, h, weights, router):
    """In plain torch what a device without memory has to compute: the same products, for those who count them."""
    full = [weight.to(x.dtype) for weight in weights]
    following, *_ = gru_arithmetic.forward(x, h, *full)
    logits = None if router is None else following @ router.to(x.dtype).mT
    return following, logits


def _runs(x: Tensor) -> bool:
    """Whether ``x`` has memory that a kernel can read."""
    return x.device.type != "meta" and _is_real(x) and (x.is_cuda or INTERPRETED)


def _is_real(*tensors: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes

    if tensors:
        return not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    return not any(type(mode).__name__ == "FakeTensorMode" for mode in modes())


class _GRURoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, w_ih, w_hh, b_ih, b_hh, router, router_bias, bf16_weights):
        logits, following, low = _forward(x, h, w_ih, w_hh, b_ih, b_hh, router, router_bias, bf16_weights)
        kept = None if router is None else following  # which is what the next layer keeps as h
        ctx.save_for_backward(x, h, kept, *low, b_ih, b_hh, router, router_bias)
        return logits, following

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logits, grad):
        return *_backward(grad_logits, grad, *ctx.saved_tensors), None


@torch.library.custom_op("rmoe::gru_route", mutates_args=())
def gru_route_op(
    x: Tensor,
    h: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    router: Tensor | None,
    router_bias: Tensor | None,
    bf16_weights: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`gru_route`, for torch.compile."""
    return _forward(x, h, weight_ih, weight_hh, bias_ih, bias_hh, router, router_bias, bf16_weights)[:2]


@torch.library.custom_op("rmoe::gru_route_backward", mutates_args=())
def gru_route_backward(
    grad_logits: Tensor,
    grad: Tensor,
    x: Tensor,
    h: Tensor | None,
    following: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    router: Tensor | None,
    router_bias: Tensor | None,
    bf16_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gru_route's eight tensors; those of None have no elements."""
    operands = _operands(x, bf16_weights)
    matrices = (weight_ih.to(operands), weight_hh.to(operands))
    grads = _backward(grad_logits, grad, x, h, following, *matrices, bias_ih, bias_hh, router, router_bias)
    return tuple(grad.new_empty(0) if value is None else value for value in grads)


@gru_route_op.register_fake
def _(x, h, weight_ih, weight_hh, bias_ih, bias_hh, router, router_bias, bf16_weights):
    logits = x.new_empty(0) if router is None else x.new_empty(*x.shape[:-1], router.shape[0])
    return logits, x.new_empty(x.shape)


@gru_route_backward.register_fake
def _(grad_logits, grad, x, h, following, weight_ih, weight_hh, bias_ih, bias_hh, router, router_bias, bf16_weights):
    like = (weight_ih, weight_hh, bias_ih, bias_hh, router, router_bias)
    others = (grad.new_empty(0) if v is None else torch.empty_like(v) for v in like)
    return grad.new_empty(x.shape), grad.new_empty(0 if h is None else x.shape), *others


def _setup(ctx, inputs, output):
    x, h, *others, ctx.bf16_weights = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, output[1], *others)


def _gradients(ctx, grad_logits, grad):
    x, h, following, *others = ctx.saved_tensors  # read once: a checkpoint raises at the second time
    grad = torch.zeros_like(following) if grad is None else grad
    if grad_logits is None:
        router = others[4]
        grad_logits = grad.new_zeros(0 if router is None else (*grad.shape[:-1], len(router)))
    grads = gru_route_backward(grad_logits, grad, x, h, following, *others, ctx.bf16_weights)
    grads = [None if value is None else grad for value, grad in zip((x, h, *others), grads, strict=True)]
    return *grads, None


gru_route_op.register_autograd(_gradients, setup_context=_setup)
