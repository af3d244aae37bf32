"""What layers share: a recurrence, a matrix, or whatever a type builds for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rmoe_megablocks.routing.config import RoutingConfig


class SharedRouting(nn.Module):
    """Base of what all layers share; one copy a process, kept the same on all pipeline stages by the host.

    A subclass reads its parameters as ``self.cast(parameter, dtype)``, in the dtype of the arithmetic: hosts that
    collect gradients elsewhere than in ``parameter.grad`` replace ``cast``. Register matrices first: in Megatron's
    gradient buffer the first parameter has a bucket to itself and the others share one, and an optimizer checkpoint
    wants a share of either for every data-parallel rank.
    """

    cast: Callable[[Tensor, torch.dtype], Tensor] = staticmethod(Tensor.to)

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config

    def unused_by(self, layers: set[int]) -> list[int]:
        """Further layers (0, 1, ... of the model) whose steps would use what those of ``layers`` do not."""
        return [] if layers else [0]
