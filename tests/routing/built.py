"""A gru router for tests, with its options as plain words."""

import torch

from rmoe_megablocks.routing import BIAS, INIT, RNN_INIT, STATE_SIZE, RouterLayer, RoutingConfig, get_router_type
from rmoe_megablocks.routing.parts.implementation import IMPL

OPTIONS = {"state_size": STATE_SIZE, "bias": BIAS, "rnn_init": RNN_INIT, "layer_init": INIT, "impl": IMPL}


def config_of(hidden_size: int, num_experts: int, state_size: int = 128, init_method=None, **options) -> RoutingConfig:
    """RoutingConfig with the options of a recurrent router."""
    chosen = {OPTIONS[name]: value for name, value in {"state_size": state_size, **options}.items()}
    drawn = {} if init_method is None else {"init_method": init_method}
    return RoutingConfig(hidden_size, num_experts, chosen, **drawn)


def layer_of(config: RoutingConfig, name: str = "gru") -> RouterLayer:
    """What a layer owns, drawn."""
    return get_router_type(name).build_layer(config)


def shared_of(config: RoutingConfig, name: str = "gru") -> torch.nn.Module:
    """What the layers share."""
    return get_router_type(name).build_shared(config)
