"""The routing mathematics in plain torch: no Megatron, no MegaBlocks.

Read :mod:`.reference` for the equations, :mod:`.layer` for what a router type is, :mod:`.types` for those there are,
:mod:`.registry` for how hosts find them and :mod:`.state` for how a state stays with the call it belongs to.
"""

from rmoe_megablocks.routing import types as _types  # noqa: F401  registers them
from rmoe_megablocks.routing.arguments import Argument, above_zero, at_least, not_negative
from rmoe_megablocks.routing.config import RoutingConfig
from rmoe_megablocks.routing.layer import RECURRENCE, RESIDUAL, RouterLayer
from rmoe_megablocks.routing.parts.initialisation import FAN_IN, INIT, INIT_METHOD, LAYER_INITS, draw, fan_in_
from rmoe_megablocks.routing.parts.recurrent import BIAS, HEAD, RNN_INIT, STATE_SIZE
from rmoe_megablocks.routing.parts.shared import Shareable, SharedRouting
from rmoe_megablocks.routing.parts.sharing import SHARE_HEAD, SHARE_PROJECTOR
from rmoe_megablocks.routing.registry import (
    LINEAR,
    RouterType,
    all_arguments,
    get_router_type,
    owners,
    register,
    router_types,
)
from rmoe_megablocks.routing.state import RoutingStateError, StateSlot

__all__ = [
    "BIAS",
    "FAN_IN",
    "HEAD",
    "INIT",
    "INIT_METHOD",
    "LAYER_INITS",
    "LINEAR",
    "RECURRENCE",
    "RESIDUAL",
    "RNN_INIT",
    "SHARE_HEAD",
    "SHARE_PROJECTOR",
    "STATE_SIZE",
    "Argument",
    "RouterLayer",
    "RouterType",
    "RoutingConfig",
    "RoutingStateError",
    "Shareable",
    "SharedRouting",
    "StateSlot",
    "above_zero",
    "all_arguments",
    "at_least",
    "draw",
    "fan_in_",
    "get_router_type",
    "not_negative",
    "owners",
    "register",
    "router_types",
]
