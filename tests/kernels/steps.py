"""Inputs and the float64 gradients of one GRU step, for tests."""

import torch
from torch import Tensor

from rmoe_megablocks.routing import reference

NAMES = ("h'", "grad x", "grad h", "grad weight_ih", "grad weight_hh", "grad bias_ih", "grad bias_hh")


def drawn(T: int, P: int, first: bool = False, dtype=torch.float64, scale: float = 1.0, seed: int = 0) -> list:
    """x, h (None with ``first``) and the four parameters as leaves, from the same numbers in every dtype."""
    torch.manual_seed(seed)
    shapes = ((T, P), (T, P), (3 * P, P), (3 * P, P), (3 * P,), (3 * P,))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[1].tanh_()
    for weight in tensors[2:4]:
        weight.mul_(scale / P**0.5)
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return [tensors[0], None if first else tensors[1], *tensors[2:]]


def results(step, inputs: list, grad: Tensor) -> list[Tensor | None]:
    """The state and all gradients, in the order of :data:`NAMES`; None for that of h where there is none."""
    leaves = [tensor for tensor in inputs if tensor is not None]
    following = step(*inputs)
    grads = list(torch.autograd.grad(following, leaves, grad.to(following.dtype)))
    if inputs[1] is None:
        grads.insert(1, None)
    return [following.detach(), *grads]


def expected(inputs: list, grad: Tensor) -> list[Tensor | None]:
    """:func:`results` of the equations in float64 on the same values."""
    doubles = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in inputs]
    x, h, *weights = doubles
    if h is None:
        return results(lambda x, _, *weights: reference.gru_step(x, torch.zeros_like(x), *weights), doubles, grad)
    return results(reference.gru_step, doubles, grad)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the expected values are all zero."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).norm().item()
    return difference / (theirs.double().norm().item() or 1.0)
