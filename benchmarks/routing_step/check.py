"""Is a provider right, and how much does it keep: asked before it is timed."""

import torch
from torch import Tensor

from benchmarks.measuring.errors import WrongResult
from benchmarks.measuring.saved_bytes import SavedBytes
from benchmarks.routing_step.inputs import OUTPUTS, Inputs, Step
from benchmarks.routing_step.providers import Provider
from benchmarks.routing_step.sizes import BF16, FP32

#: largest relative error (Frobenius) of outputs and of gradients, by the dtypes of hidden states and of the arithmetic:
#: several times what correct ones have, far below what a wrong sign or a gate in another's place makes
BOUNDS = {(FP32, FP32): (1e-5, 1e-5), (BF16, BF16): (3e-2, 5e-2), (BF16, FP32): (1e-4, 1e-2)}


class Check:
    """Holds steps on the same inputs against the equations in float64."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._truths: dict[tuple, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def errors(self, provider: Provider, step: Step) -> tuple[float, float]:
        """Largest relative error of the outputs and of the gradients.

        Raises:
            WrongResult: one of them is beyond its bound, or no number.
        """
        outputs = step.run()
        grads = iter(step.backward(outputs, self._inputs))
        gradients = {}
        for name, parts in step.leaves.items():
            found = [next(grads) for _ in parts]
            if any(grad is None for grad in found):
                raise WrongResult(f"--providers {provider.name}: {name} has no gradient: it is not timed")
            gradients[name] = torch.cat(found)
        true_outputs, true_gradients = self._truth(provider, step)
        found = (
            {name: _error(ours, true_outputs[name]) for name, ours in zip(true_outputs, outputs, strict=True)},
            {name: _error(ours, true_gradients[name]) for name, ours in gradients.items()},
        )
        size = self._inputs.size
        bounds = BOUNDS[size.hidden, provider.arithmetic(size)]
        for what, errors, bound in zip(("", "the gradient of "), found, bounds, strict=True):
            for name, error in errors.items():
                if not error <= bound:
                    raise WrongResult(
                        f"--providers {provider.name}: {what}{name} is off by {error:.1e} of the float64 reference, "
                        f"allowed is {bound:.0e}: it is not timed"
                    )
        return max(found[0].values()), max(found[1].values())

    def _truth(self, provider: Provider, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and gradients of the equations on the values that this provider has; the same for those of a kind."""
        key = (provider.equations, *((name, parts[0].dtype) for name, parts in step.leaves.items()))
        if key not in self._truths:
            doubles = {n: torch.cat([p.detach() for p in parts]).double() for n, parts in step.leaves.items()}
            doubles = {name: value.requires_grad_() for name, value in doubles.items()}
            outputs = provider.equations(doubles)
            truth = Step(lambda: outputs, {name: (value,) for name, value in doubles.items()})
            grads = truth.backward(outputs, self._inputs)
            self._truths[key] = (
                {name: output.detach() for name, output in zip(OUTPUTS, outputs, strict=False)},
                dict(zip(doubles, grads, strict=True)),
            )
        return self._truths[key]


def _error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.detach().double() - truth).norm() / truth.norm()).item()


def saved_bytes(step: Step) -> int:
    """What one layer's step keeps: without parameters, hidden states and the state of the previous layer, which has
    counted it: the new state counts, also where nothing but the next layer keeps it. Copies of parameters count.
    """
    with SavedBytes(part for parts in step.leaves.values() for part in parts) as saved:
        outputs = step.run()
    for state in outputs[1:]:
        saved.add(state)
    return saved.total
