"""The head ``cosine`` on hidden states: see :mod:`rmoe_megablocks.routing.parts.heads`."""

from rmoe_megablocks.routing.parts.heads import TEMPERATURE, CosineHead, HeadLayer
from rmoe_megablocks.routing.registry import register


@register("cosine")
class CosineRouter(HeadLayer):
    """cosine similarity to one embedding an expert, with a learnt temperature."""

    arguments = (TEMPERATURE,)
    head = CosineHead
