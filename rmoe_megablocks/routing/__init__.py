"""The routing mathematics in plain torch: no Megatron, no MegaBlocks.

Read :mod:`.reference` for the equations, :mod:`.registry` for the router types and how wide a state each
carries, :mod:`.layer` for what every MoE layer owns, :mod:`.gru` for what all layers share and :mod:`.state` for how
a state stays with the call it belongs to.
"""

from rmoe_megablocks.routing import gru as _gru  # noqa: F401  registers "gru"
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.initialisation import FAN_IN, INIT_METHOD, LAYER_INITS, fan_in_
from rmoe_megablocks.routing.layer import LayerRouting
from rmoe_megablocks.routing.registry import RouterType, get_router_type, register, router_types
from rmoe_megablocks.routing.state import RoutingStateError, StateSlot

__all__ = [
    "FAN_IN",
    "INIT_METHOD",
    "LAYER_INITS",
    "LayerRouting",
    "RouterType",
    "RoutingConfig",
    "RoutingStateError",
    "StateSlot",
    "fan_in_",
    "get_router_type",
    "register",
    "router_types",
]
