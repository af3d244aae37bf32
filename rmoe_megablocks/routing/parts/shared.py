"""What layers share: a recurrence, a matrix, or whatever a type builds for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rmoe_megablocks.routing.config import RoutingConfig


class Shareable(nn.Module):
    """Base of what a layer may own or layers may share.

    A subclass reads its parameters as ``self.cast(parameter, dtype)``, in the dtype of the arithmetic: hosts that
    collect the gradients of what is shared elsewhere than in ``parameter.grad`` replace ``cast``.
    """

    cast: Callable[[Tensor, torch.dtype], Tensor] = staticmethod(Tensor.to)

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config


class SharedRouting(Shareable):
    """Base of what all layers share; one copy a process, kept the same on all pipeline stages by the host.

    Register matrices first: in Megatron's gradient buffer the first parameter has a bucket to itself and the others
    share one, and an optimizer checkpoint wants a share of either for every data-parallel rank. Parameters belong to
    this module, or to children, :class:`Shareable` ones, that are called as modules.
    """

    def set_cast(self, cast: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        """Has this module and its children read their parameters by ``cast``."""
        for module in self.modules():
            if isinstance(module, Shareable):
                module.cast = cast

    def unused_by(self, layers: set[int]) -> list[int]:
        """Further layers (0, 1, ... of the model) whose steps would use what those of ``layers`` do not."""
        return [] if layers else [0]
