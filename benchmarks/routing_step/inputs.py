"""The tensors of one routing step, and what the equations make of them in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.routing_step.sizes import FP32, Size
from rmoe_megablocks.routing import reference

Values = dict[str, Tensor]
OUTPUTS = ("logits", "state")


class Inputs:
    """What every provider is given, from one seed, so that logits and gates are of the size they have in training.

    ``values``: x [T, H] and h [T, P] (a state: within +-1), projector [P, H], weight_ih, weight_hh [3P, P], bias_ih,
    bias_hh [3P], router [E, P], gate [E, H], all in fp32. Parameters, x and the gradients of the outputs have values
    that the dtype of the hidden states holds exactly.
    """

    def __init__(self, size: Size, tokens: int, device: torch.device, seed: int = 1) -> None:
        self.size, self.tokens, self.device = size, tokens, device
        generator = torch.Generator().manual_seed(seed)
        H, P, E = size.hidden_size, size.state_size, size.experts

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) * scale
            return drawn.to(size.hidden).float().to(device)

        self.values: Values = {
            "x": normal(tokens, H),
            "h": torch.randn(tokens, P, generator=generator).tanh().to(size.state).float().to(device),
            "projector": normal(P, H, scale=1 / math.sqrt(H)),
            "weight_ih": normal(3 * P, P, scale=1 / math.sqrt(P)),
            "weight_hh": normal(3 * P, P, scale=1 / math.sqrt(P)),
            "bias_ih": normal(3 * P, scale=1 / math.sqrt(P)),
            "bias_hh": normal(3 * P, scale=1 / math.sqrt(P)),
            "router": normal(E, P, scale=1 / math.sqrt(P)),
            "gate": normal(E, H, scale=1 / math.sqrt(H)),
        }
        self._grads = {("logits", FP32): normal(tokens, E), ("state", FP32): normal(tokens, P)}

    def grad(self, output: str, dtype: torch.dtype) -> Tensor:
        """Of an output, in its dtype: converted once, so that no conversion is timed."""
        if (output, dtype) not in self._grads:
            self._grads[output, dtype] = self._grads[output, FP32].to(dtype)
        return self._grads[output, dtype]

    def leaf(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy that a gradient is taken of."""
        return self.values[name].to(dtype, copy=True).requires_grad_()


@dataclass
class Step:
    """One provider's step on its own copies of the inputs.

    Attributes:
        run: the forward pass: logits [T, E] and the state [T, P], or logits alone of what has no state.
        leaves: what gradients are taken of, by the inputs' names; several tensors are parts of one, along its rows.
    """

    run: Callable[[], tuple[Tensor, ...]]
    leaves: dict[str, tuple[Tensor, ...]]

    def backward(self, outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor | None, ...]:
        """Gradients of all leaves, in their order, None where the outputs do not depend on one; none adds up."""
        grads = [inputs.grad(name, output.dtype) for name, output in zip(OUTPUTS, outputs, strict=False)]
        leaves = [part for parts in self.leaves.values() for part in parts]
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def recurrence(values: Values) -> tuple[Tensor, ...]:
    """Eq. 4-6: logits and state."""
    weights = (values[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = reference.gru_step(values["x"] @ values["projector"].T, values["h"], *weights)
    return h @ values["router"].T, h


def product(values: Values) -> tuple[Tensor, ...]:
    """Projector and router matrix, nothing between them: logits."""
    return (values["x"] @ values["projector"].T @ values["router"].T,)


def linear(values: Values) -> tuple[Tensor, ...]:
    """The linear router: logits."""
    return (values["x"] @ values["gate"].T,)
