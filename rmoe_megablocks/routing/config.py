"""What a router needs to know, whichever host builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from rmoe_megablocks.routing.arguments import Argument

Init = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class RoutingConfig:
    """Sizes, initialisation and the choices of a router: ``config[ARGUMENT]`` is what was chosen, or its default.

    Args:
        hidden_size: H, width of the hidden states.
        num_experts: E, number of logits a token gets.
        options: values by :class:`.Argument` (or its ``dest``); those left out have their defaults.
        num_layers: of the model, for what blocks of layers share.
        init_method: fills a weight matrix in place where ``--moe-router-init init_method`` draws it; default N(0, .02).
        moe_layers: which layers have experts, by index from 0; None where the host does not say.

    Raises:
        ValueError: a size that is no whole number of at least 1, a value that an argument does not take.
    """

    hidden_size: int
    num_experts: int
    options: Mapping[Argument | str, Any] = field(default_factory=dict, hash=False)
    num_layers: int = 1
    init_method: Init = partial(torch.nn.init.normal_, mean=0.0, std=0.02)
    moe_layers: frozenset[int] | None = None
    _values: tuple[tuple[str, Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_experts", "num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        values = {}
        for key, value in self.options.items():
            if isinstance(key, Argument):
                try:
                    values[key.dest] = key.checked(value)
                except ValueError as error:
                    raise ValueError(f"{key.dest} {error}") from None
            else:
                values[key] = value
        object.__setattr__(self, "options", values)  # by name: an argument's check cannot be pickled
        object.__setattr__(self, "_values", tuple(sorted(values.items())))

    def __getitem__(self, argument: Argument) -> Any:
        return dict(self._values).get(argument.dest, argument.default)
