"""What a recurrent router takes, measured on its own modules: built on the meta device, they have shapes and no memory.

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
class RoutingCost:
    """A recurrent router's sizes.

    Attributes:
        state_size: elements of a token's state.
        shared: parameters of what all layers share, of which every pipeline stage has a copy.
        layer: parameters of what every MoE layer owns.
        flops: of one layer for one token, forward; two for a multiplication with its addition.
        kept: bytes that one layer keeps of one token for the backward pass, its input and its logits left out.
        kept_once: bytes that one layer keeps whatever the number of tokens: parameters in another dtype.
    """

    state_size: int
    shared: int
    layer: int
    flops: int
    kept: int
    kept_once: int


@functools.cache
def measure(router_type: RouterType, config: RoutingConfig, dtype_bytes: int, router_dtype_bytes: int) -> RoutingCost:
    """The cost of a recurrent router in a model of ``dtype_bytes``, routed in ``router_dtype_bytes``."""
    with torch.device("meta"):
        shared, layer = router_type.build_shared(config) or nn.Module(), router_type.layer(config)
    shared.to(_DTYPES[dtype_bytes]), layer.to(_DTYPES[dtype_bytes])
    state_size = router_type.state_size(config)

    def run(tokens: int) -> tuple[torch.Tensor, ...]:
        x_TH = torch.empty(tokens, config.hidden_size, dtype=_DTYPES[dtype_bytes], device="meta", requires_grad=True)
        h_TP = torch.empty(tokens, state_size, dtype=_DTYPES[router_dtype_bytes], device="meta", requires_grad=True)
        return x_TH, h_TP, *layer(x_TH, h_TP if state_size else None, shared, _DTYPES[router_dtype_bytes])

    with FlopCounterMode(display=False) as counter:
        run(1)
    # not one token: a slice of a single row is contiguous, and keeps what more rows would not
    two, three = (_kept(lambda tokens=tokens: run(tokens), layer, shared) for tokens in (2, 3))
    return RoutingCost(
        state_size=state_size,
        shared=_count(shared),
        layer=_count(layer),
        flops=counter.get_total_flops(),
        kept=three - two,
        kept_once=3 * two - 2 * three,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept(run, *modules: nn.Module) -> int:
    """Bytes that autograd keeps of ``run() -> (inputs and results)``, each storage once, without parameters,
    the inputs and the logits (which the layer that made them, and the scores, are counted with)."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_TH, h_TP, logits_TE, _ = run()
    elsewhere = [x_TH, h_TP, logits_TE, *(p for module in modules for p in module.parameters())]
    addresses = {tensor.untyped_storage()._cdata for tensor in elsewhere}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in addresses)
