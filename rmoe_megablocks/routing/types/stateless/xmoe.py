"""The head ``xmoe`` on hidden states: see :mod:`rmoe_megablocks.routing.parts.heads`."""

from rmoe_megablocks.routing.parts.heads import TEMPERATURE, XMOE_SIZE, HeadLayer, XMoEHead
from rmoe_megablocks.routing.registry import register


@register("xmoe")
class XMoERouter(HeadLayer):
    """X-MoE: similarity to the experts' embeddings in a space of few dimensions."""

    arguments = (TEMPERATURE, XMOE_SIZE)
    head = XMoEHead
