"""Routers of any type in float64 for tests: drawn so that no parameter is what hides a mistake, and run by layers."""

import itertools

import torch
from torch import Tensor, nn

from rmoe_megablocks.routing import RoutingConfig, get_router_type, router_types

T, H, E, LAYERS = 5, 6, 4, 3
#: types that have something to define: the host's own router is the host's
TYPES = [name for name in router_types() if get_router_type(name).replaces_hosts]


def having(argument) -> list[str]:
    """The types that take ``argument``."""
    return [name for name in TYPES if argument in get_router_type(name).arguments]


class Stack(nn.Module):
    """LAYERS layers of a type and what they share."""

    def __init__(self, kind: str, chosen: dict | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.type = get_router_type(kind)
        widths = {a: 3 for a in self.type.arguments if type(a.default) is int}  # small, whatever a type calls them
        self.config = RoutingConfig(H, E, widths | (chosen or {}), num_layers=LAYERS)
        self.layers = nn.ModuleList(self.type.build_layer(self.config) for _ in range(LAYERS))
        self.shared = self.type.build_shared(self.config)
        for index, layer in enumerate(self.layers):
            layer.index = index
        self.double()
        for parameter in self.parameters():  # biases of 0 and norms of 1 too
            nn.init.normal_(parameter.data, std=0.7)

    def forward(self, inputs: list[Tensor], between=lambda h: h) -> tuple[list[Tensor], list[Tensor | None]]:
        """Logits and states of all layers, ``between`` on what goes from layer to layer."""
        h, logits, states = None, [], []
        for layer, x in zip(self.layers, inputs, strict=True):
            logits_i, h = layer(x, between(h), self.shared)
            logits.append(logits_i)
            states.append(h)
        return logits, states

    def defined(self, definition, inputs: list[Tensor], between=lambda h: h, shared: list[dict] | None = None):
        """The same by ``definition``, with the shared parameters or with each layer's own copy of them."""
        s = {} if self.shared is None else dict(self.shared.named_parameters())
        h, logits, states = None, [], []
        for layer, x, own in zip(self.layers, inputs, shared or [s] * LAYERS, strict=True):
            logits_i, h = definition(dict(layer.named_parameters()), own, x, between(h))
            logits.append(logits_i)
            states.append(h)
        return logits, states

    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def inputs_of(seed: int = 1) -> list[Tensor]:
    """x [T, H] of every layer."""
    torch.manual_seed(seed)
    return [torch.randn(T, H, dtype=torch.float64, requires_grad=True) for _ in range(LAYERS)]


def scalar(logits: list[Tensor], states: list[Tensor | None]) -> Tensor:
    """A loss that weighs every logit and every element of the last state differently."""
    torch.manual_seed(2)
    parts = [*logits, *(state for state in states[-1:] if state is not None)]
    return sum((torch.randn_like(part) * torch.tanh(part)).sum() for part in parts)


def gradients(results, leaves: list[Tensor]) -> list[Tensor]:
    """Of :func:`scalar`; zeros for what it does not depend on."""
    found = torch.autograd.grad(scalar(*results), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def same(ours, theirs, tolerance: float = 1e-12) -> None:
    """Raises for tensors, or lists of them, that differ by more than ``tolerance``."""
    for mine, other in itertools.zip_longest(ours, theirs):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.isfinite().all() and mine.dtype == torch.float64
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
