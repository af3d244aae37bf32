"""Megatron's router, ours and the one drawn otherwise, with null experts: E + M logits, of which E can be chosen."""

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from rmoe_megablocks.megatron.recurrence.router import FanInTopKRouter, RecurrentTopKRouter
from rmoe_megablocks.routing.parts.null_experts import balanced_choices, real_weights


class NullExperts(TopKRouter):
    """Replaces what is made of logits; z-loss, aux losses, their scale and their place in the graph are upstream's.

    What leaves the router has the width of the real experts: dispatch and experts know nothing of the others.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.global_tokens_per_expert is not None:  # what global_aux_loss adds up
            counts = self.global_tokens_per_expert
            self.global_tokens_per_expert = counts.new_zeros(len(counts) + self.config.moe_null_experts)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E + M] -> weights [T, E] in their dtype and map [T, E], 0 to K experts a token.

        ``padding_mask`` [S, B] is True for tokens that the losses leave out.
        """
        config, experts = self.config, self.config.num_moe_experts
        length, batch = logits.shape[:2]
        logits_TN = logits.reshape(-1, experts + config.moe_null_experts)
        padding_mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TN = self.apply_z_loss(logits_TN, padding_mask=padding_mask)
        with torch.no_grad():
            _, chosen_TN = topk_routing_with_score_function(logits_TN, self.topk, score_function=self.score_function)
        weights_TE = real_weights(logits_TN, chosen_TN, experts, self.score_function)
        if config.moe_router_topk_scaling_factor:
            weights_TE = weights_TE * config.moe_router_topk_scaling_factor
        weights_TE = weights_TE.type_as(logits_TN)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            weights_TE = self._with_losses(weights_TE, logits_TN, length, batch, padding_mask)
        return weights_TE, chosen_TN[:, :experts].contiguous()

    def _with_losses(
        self, weights_TE: Tensor, logits_TN: Tensor, length: int, batch: int, padding_mask: Tensor | None
    ) -> Tensor:
        """Attaches each aux loss to the weights, as upstream's routing does."""
        chosen_TN, scores_TN = compute_routing_scores_for_aux_loss(
            logits_TN, self.topk, self.score_function, padding_mask=padding_mask
        )
        experts = self.config.num_moe_experts
        counts_TN = balanced_choices(chosen_TN, experts)
        scores_TN = scores_TN * (scores_TN.shape[1] / experts)  # upstream multiplies by E, the loss has E + M
        padded = padding_mask is not None
        weights_TE = self._apply_aux_loss(weights_TE, scores_TN, counts_TN, with_padding_mask=padded)
        weights_TE = self._apply_seq_aux_loss(weights_TE, scores_TN, counts_TN, length, batch, with_padding_mask=padded)
        return self._apply_global_aux_loss(weights_TE, scores_TN, counts_TN, with_padding_mask=padded)


class _WideGate(NullExperts):
    """The host's own matrix with a row for each null expert below those of the real ones."""

    def reset_parameters(self) -> None:
        """Called by Megatron's constructor once it has made matrix and bias: makes longer ones, which are drawn."""
        rows = self.config.num_moe_experts + self.config.moe_null_experts
        self.weight = nn.Parameter(self.weight.new_empty(rows, self.weight.shape[1]))
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.new_empty(rows))
        super().reset_parameters()


class NullTopKRouter(_WideGate, TopKRouter):
    """Megatron's own router."""


class NullFanInTopKRouter(_WideGate, FanInTopKRouter):
    """The same with ``--moe-router-init fan_in``."""


class NullRecurrentTopKRouter(NullExperts, RecurrentTopKRouter):
    """Every other type: what it gives a layer is built for E + M logits."""


#: by the router that stands where null experts are wanted
WITH_NULL_EXPERTS = {
    TopKRouter: NullTopKRouter,
    FanInTopKRouter: NullFanInTopKRouter,
    RecurrentTopKRouter: NullRecurrentTopKRouter,
}
