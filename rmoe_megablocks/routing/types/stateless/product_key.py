"""The head ``product_key`` on hidden states: see :mod:`rmoe_megablocks.routing.parts.heads`."""

from rmoe_megablocks.routing.parts.heads import HeadLayer, ProductKeyHead
from rmoe_megablocks.routing.registry import register


@register("product_key")
class ProductKeyRouter(HeadLayer):
    """PEER: an expert's logit is the sum of two out of 2 sqrt(E), for many small experts."""

    head = ProductKeyHead
