"""What a router type takes, measured on its own modules: built on the meta device, they have shapes and no memory.

Nothing here knows a router type: one that is registered tomorrow is counted as it is built.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rmoe_megablocks.routing import RouterType, RoutingConfig

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Operations:
    """FLOPs of one layer, two for a multiplication with its addition: of every token, and of a call for all its tokens
    together, as of a network that makes the router's matrix."""

    token: int
    call: int

    def of_a_token(self, tokens: int) -> float:
        """One token's share of a call for ``tokens``."""
        return self.token + self.call / tokens


@dataclass(frozen=True)
class RoutingCost:
    """The sizes of a router that replaces the host's.

    Attributes:
        state_size: elements of a token's state.
        shared: parameters of what all layers share, of which every pipeline stage has a copy.
        layer: parameters of what every MoE layer owns.
        frozen_shared, frozen_layer: of these, those that are never trained.
        buffers_shared, buffers_layer: bytes of the buffers that each of them has beside its parameters.
        forward, backward: of one layer. Weights that are frozen, and states whose gradient is cut, take less than
            twice the forward pass.
        kept: bytes that one layer with another before it keeps of one token for the backward pass, its hidden states
            and its logits left out. The model's first layer keeps less where it has no state, and nobody may keep the
            last layer's.
        kept_once: bytes that one layer keeps whatever the number of tokens: parameters in another dtype.
        keeps_input: whether it keeps the hidden states themselves.
    """

    state_size: int
    shared: int
    layer: int
    frozen_shared: int
    frozen_layer: int
    buffers_shared: int
    buffers_layer: int
    forward: Operations
    backward: Operations
    kept: int
    kept_once: int
    keeps_input: bool


@functools.cache
def measure(router_type: RouterType, config: RoutingConfig, dtype_bytes: int, router_dtype_bytes: int) -> RoutingCost:
    """The cost of a router in a model of ``dtype_bytes``, routed in ``router_dtype_bytes``."""
    with torch.device("meta"):
        shared, layer = router_type.build_shared(config) or nn.Module(), router_type.layer(config)
    shared.to(_DTYPES[dtype_bytes]), layer.to(_DTYPES[dtype_bytes])
    state_size = router_type.state_size(config)

    def run(tokens: int, layers: int = 1) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor | None]]:
        """Hidden states of each layer, the first state, and what the layers return, one behind the other."""
        sizes = {"dtype": _DTYPES[dtype_bytes], "device": "meta", "requires_grad": True}
        xs = [torch.empty(tokens, config.hidden_size, **sizes) for _ in range(layers)]
        first = h_TP = torch.empty(tokens, state_size, **(sizes | {"dtype": _DTYPES[router_dtype_bytes]}))
        results = []
        for x_TH in xs:
            logits_TE, h_TP = layer(x_TH, h_TP if state_size else None, shared, _DTYPES[router_dtype_bytes])
            results += [logits_TE, h_TP]
        return xs, first, results

    # not one token: a slice of a single row is contiguous, and keeps what more rows would not
    two, three = (_operations(lambda tokens=tokens: run(tokens)) for tokens in (2, 3))
    forward, backward = (Operations(b - a, 3 * a - 2 * b) for a, b in zip(two, three, strict=True))
    # of a second layer, which keeps of the first one's state what that one does not
    two, three = (_further(lambda layers, tokens=tokens: run(tokens, layers), layer, shared) for tokens in (2, 3))
    _, keeps_input = _kept(lambda: run(2), layer, shared)
    return RoutingCost(
        state_size=state_size,
        shared=_count(shared),
        layer=_count(layer),
        frozen_shared=_count(shared, frozen=True),
        frozen_layer=_count(layer, frozen=True),
        buffers_shared=_buffers(shared),
        buffers_layer=_buffers(layer),
        forward=forward,
        backward=backward,
        kept=three - two,
        kept_once=3 * two - 2 * three,
        keeps_input=keeps_input,
    )


def _count(module: nn.Module, frozen: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not (frozen and parameter.requires_grad))


def _buffers(module: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def _operations(run) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of ``run() -> (hidden states, state, results)``."""
    with FlopCounterMode(display=False) as forward:
        results = [result for result in run()[2] if result is not None and result.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return forward.get_total_flops(), backward.get_total_flops()


def _further(run, *modules: nn.Module) -> int:
    """Bytes that a second layer adds to those of one, of ``run(layers)``."""
    one, two = (_kept(lambda layers=layers: run(layers), *modules)[0] for layers in (1, 2))
    return two - one


def _kept(run, *modules: nn.Module) -> tuple[int, bool]:
    """Bytes that autograd keeps of ``run() -> (hidden states, state, results)``, each storage once, without parameters,
    the hidden states, the first state and the logits (which the layer that made them, and the scores, are counted
    with); and whether the hidden states are among what it keeps."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        xs, h_TP, results = run()
    elsewhere = [*xs, h_TP, *results[::2], *(p for module in modules for p in module.parameters())]
    addresses = {tensor.untyped_storage()._cdata for tensor in elsewhere}
    kept = sum(storage.nbytes() for address, storage in storages.items() if address not in addresses)
    return kept, xs[0].untyped_storage()._cdata in storages
