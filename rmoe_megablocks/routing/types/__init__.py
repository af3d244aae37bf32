"""One file a router type; a new one is imported here."""

from rmoe_megablocks.routing.types import (  # noqa: F401  each registers its types
    cosine,
    eda,
    gru,
    hyper,
    lstm,
    mlp,
    omni,
    product_key,
    random,
    rnn,
    xmoe,
)
