"""Initial values of what belongs to the routing: drawn by :mod:`rmoe_megablocks.routing`, put where none was loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import initialization

from rmoe_megablocks.routing import SharedRouting, draw

from .configuration import RmoeConfig
from .layers.moe import RmoeRouter


@contextmanager
def fp32_by_default() -> Iterator[None]:
    """Orthogonal matrices, for one, are not drawn in bf16, which is the default dtype while such a model is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_shared(config: RmoeConfig) -> SharedRouting | None:
    """What all layers share, in the default dtype; None of a type whose layers share nothing."""
    kind, routing = config.routing()
    with fp32_by_default():
        shared = kind.build_shared(routing)
    return None if shared is None else shared.to(torch.get_default_dtype())


def draw_router(router: RmoeRouter) -> None:
    """Draws what of one layer's router was not loaded."""
    kind, routing = router.config.routing()
    if router.layer is not None:
        _draw(router.layer, lambda: kind.layer(routing), lambda: kind.build_layer(routing))
    elif not _loaded(router.weight):
        weight = torch.empty_like(router.weight, dtype=torch.float32)
        draw(routing, weight)
        initialization.copy_(router.weight, weight)
    if router.expert_bias is not None:
        initialization.zeros_(router.expert_bias)


def draw_shared(shared: SharedRouting, config: RmoeConfig) -> None:
    """Draws what of the layers' common part was not loaded."""
    kind, routing = config.routing()
    _draw(shared, lambda: kind.build_shared(routing), lambda: kind.build_shared(routing))


def _loaded(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def _draw(module: nn.Module, build: Callable[[], nn.Module], drawn: Callable[[], nn.Module]) -> None:
    """The library replaces parameters by loaded ones, all of them trained: what a type freezes is frozen again."""
    with torch.device("meta"):
        trained = {name: parameter.requires_grad for name, parameter in build().named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
    ours = dict([*module.named_parameters(), *module.named_buffers()])
    if all(map(_loaded, ours.values())):
        return
    with fp32_by_default(), torch.device(next(iter(ours.values())).device):
        fresh = drawn()
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        initialization.copy_(ours[name], tensor)
