"""Parts of a router that consecutive layers share: one module a block of layers."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from rmoe_megablocks.routing.arguments import Argument
from rmoe_megablocks.routing.config import RoutingConfig

OWN, ALL = "layer", "all"


def _block_size(value: str) -> str | None:
    plain = value in (OWN, ALL) or re.fullmatch("[1-9][0-9]*", value)
    return None if plain else "must be layer, all or a whole number of at least 1"


def _share(what: str) -> Argument:
    return Argument(
        f"--moe-router-share-{what}",
        OWN,
        f"Which layers share a recurrent router's {what}: layer (the default) none, all those of the model, N those of "
        "each block of N consecutive layers, dense ones counted, on whatever pipeline stages they are.",
        check=_block_size,
        metavar="{layer,N,all}",
    )


SHARE_PROJECTOR = _share("projector")
SHARE_HEAD = _share("head")


def is_shared(config: RoutingConfig, argument: Argument) -> bool:
    """Whether layers share what ``argument`` is about, rather than each owning one."""
    return config[argument] != OWN


def block_size(config: RoutingConfig, argument: Argument) -> int:
    """Layers of a block: layer i belongs to block i // block_size."""
    size = {OWN: 1, ALL: config.num_layers}.get(config[argument])
    return int(config[argument]) if size is None else size


def check_blocks(config: RoutingConfig, argument: Argument) -> None:
    """Raises ValueError, one line, for blocks of more layers than the model has, or of dense layers alone."""
    size, layers = block_size(config, argument), config.num_layers
    if size > layers:
        raise ValueError(f"{argument.option} {size}: the model has {layers} layers, use all")
    if not is_shared(config, argument) or config.moe_layers is None:
        return
    for first in range(0, layers, size):
        block = range(first, min(first + size, layers))
        if config.moe_layers.isdisjoint(block):
            raise ValueError(
                f"{argument.option} {config[argument]}: the block of layers {block[0] + 1} to {block[-1] + 1} has no "
                "layer with experts, which would use what is shared"
            )


class Blocks(nn.ModuleList):
    """What the layers of each block share, in the order of the blocks; ``build()`` makes one."""

    def __init__(self, config: RoutingConfig, argument: Argument, build: Callable[[], nn.Module]) -> None:
        self.size = block_size(config, argument)
        super().__init__(build() for _ in range(-(-config.num_layers // self.size)))
        for module in self:
            module.reset_parameters()

    def of(self, index: int) -> nn.Module:
        """The module of layer ``index``, counted from 0."""
        return self[index // self.size if len(self) > 1 else 0]
