"""Every router type and modifier with its arguments in the small model, generated from the registry."""

import dataclasses
import functools

import torch

from rmoe_megablocks.routing import (
    HEAD,
    RECURRENCE,
    RESIDUAL,
    STATE_SIZE,
    Argument,
    RouterType,
    RoutingConfig,
    all_arguments,
    get_router_type,
    router_types,
)
from tests.distributed.arguments import BASE, SIZES


@dataclasses.dataclass(frozen=True)
class Router:
    """A type with some of its arguments chosen, beside those of the base model."""

    kind: str
    chosen: tuple[tuple[Argument, object], ...] = ()

    @property
    def name(self) -> str:
        """As the table has it: ``gru --moe-router-recurrence none``."""
        return " ".join([self.kind, *(f"{argument.option} {value}" for argument, value in self.chosen)])

    @property
    def type(self) -> RouterType:
        return get_router_type(self.kind)

    @property
    def argv(self) -> list[str]:
        """To be added to BASE, whose arguments of other types it takes back."""
        foreign = [argument for argument in all_arguments() if argument not in self.type.arguments]
        taken_back = [f"{argument.option}=null" for argument in foreign if argument.option in BASE]
        if self.config[RESIDUAL]:
            taken_back.append("--moe-z-loss-coeff=null")  # which means nothing to it, and is refused
        chosen = [word for argument, value in self.chosen for word in (argument.option, str(value))]
        return ["--moe-router-type", self.kind, *taken_back, *chosen]

    @property
    def config(self) -> RoutingConfig:
        """Its sizes in the base model."""
        sizes = {STATE_SIZE: SIZES[STATE_SIZE.option]} | dict(self.chosen)
        options = {argument: value for argument, value in sizes.items() if argument in self.type.arguments}
        return RoutingConfig(SIZES["--hidden-size"], SIZES["--num-experts"], options, SIZES["--num-layers"])

    @property
    def gives_gradients_back(self) -> bool:
        """Whether a layer's state has a gradient from the next layer."""
        own = self.config[RECURRENCE] == "full" and self.type.layer and self.type.layer.own_state_size(self.config)
        return bool(own or self.config[RESIDUAL])

    @property
    def shares(self) -> bool:
        """Whether layers share something that is trained."""
        return any(parameter.requires_grad for _, parameter in _parameters(self)[1])

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of all parameters that are not trained, as they are in a model of the base's layers."""
        own, shared = ([name for name, p in group if not p.requires_grad] for group in _parameters(self))
        layers = range(SIZES["--num-layers"])
        return (
            *(f"decoder.layers.{layer}.mlp.router.routing_layer.{name}" for layer in layers for name in own),
            *(f"rnn_router.cell.{name}" for name in shared),
        )


@functools.cache
def _parameters(router: Router) -> tuple[list, list]:
    """(name, parameter) of one layer and of what layers share."""
    if not router.type.replaces_hosts:
        return [], []
    with torch.device("meta"):
        layer, shared = router.type.build_layer(router.config), router.type.build_shared(router.config)
    return list(layer.named_parameters()), [] if shared is None else list(shared.named_parameters())


TYPES = [Router(kind) for kind in router_types()]
MODIFIED = [
    *(Router("gru", ((RECURRENCE, choice),)) for choice in RECURRENCE.choices if choice != RECURRENCE.default),
    *(Router(kind, ((RESIDUAL, 0.5),)) for kind in ("gru", "mlp")),
    *(Router("gru", ((HEAD, choice),)) for choice in HEAD.choices if choice != HEAD.default),
]
ROUTERS = {router.name: router for router in (*TYPES, *MODIFIED)}
