"""Router types by name. A new type is one module in this package that calls :func:`register`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmoe_megablocks.routing.config import RoutingConfig


class SharedCell(nn.Module):
    """Base of the recurrences that all layers share: ``cell(p_TP, h_TP or None) -> h_TP``.

    A cell reads its parameters as ``self.cast(parameter, dtype)``, in the dtype of ``p_TP``. Hosts that collect
    gradients elsewhere than in ``parameter.grad`` replace ``cast``. Register the matrices first: in Megatron's
    gradient buffer the first parameter has a bucket to itself and the others share one, and an optimizer
    checkpoint wants a share of either for every data-parallel rank.
    """

    cast: Callable[[Tensor, torch.dtype], Tensor] = staticmethod(Tensor.to)


@dataclass(frozen=True)
class RouterType:
    """One choice of ``--moe-router-type``.

    Attributes:
        name: the spelling users type.
        summary: one line for help texts.
        state_size: P of the state handed from layer to layer, 0 for a router that keeps none. Hosts size
            their pipeline messages by it.
        build_shared: builds the recurrence that all layers share. None for a stateless type, whose hosts use
            their own router.
    """

    name: str
    summary: str
    state_size: Callable[[RoutingConfig], int]
    build_shared: Callable[[RoutingConfig], SharedCell] | None = None

    @property
    def recurrent(self) -> bool:
        """Whether the type carries a state from layer to layer."""
        return self.build_shared is not None


_ROUTER_TYPES: dict[str, RouterType] = {}


def register(router_type: RouterType) -> RouterType:
    """Makes ``router_type`` a choice. Raises ValueError when its name is taken."""
    if router_type.name in _ROUTER_TYPES:
        raise ValueError(f"router type {router_type.name!r} is already registered")
    _ROUTER_TYPES[router_type.name] = router_type
    return router_type


def get_router_type(name: str) -> RouterType:
    """The registered type called ``name``. Raises ValueError that lists the known ones."""
    try:
        return _ROUTER_TYPES[name]
    except KeyError:
        known = ", ".join(_ROUTER_TYPES)
        raise ValueError(f"unknown router type {name!r}; known: {known}") from None


def router_types() -> tuple[str, ...]:
    """Names of all registered types, in the order of registration."""
    return tuple(_ROUTER_TYPES)


register(RouterType("linear", "the host's own router, one matrix a layer, no state", state_size=lambda config: 0))
