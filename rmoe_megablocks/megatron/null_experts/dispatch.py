"""Megatron's all-to-all for a number of experts that varies from token to token."""

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from rmoe_megablocks.megatron.null_experts import options as null_experts


class VaryingAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends as many rows as are chosen. Upstream sends K a token where no capacity drops any (token_dispatcher.py:550).

    The all-gather dispatcher counts the rows of its map.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As upstream: map [T, E] -> tokens of each local expert."""
        tokens_per_expert = super().preprocess(routing_map)
        if null_experts.of(self.config):
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")  # where it is needed on the host
        return tokens_per_expert
