"""The load-balancing loss, layer by layer as Megatron computes it, from recorded logits."""

import torch
from torch import Tensor

from rmoe_megablocks.routing.parts.null_experts import balanced_choices

from ..configuration import RmoeConfig


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], config: RmoeConfig, attention_mask: Tensor | None = None
) -> Tensor:
    """Sum or mean over layers of Megatron's switch_load_balancing_loss_func with a coefficient of 1.

    A layer's loss is N / (K T^2) sum_e counts_e scores_e, N = E + M, 1 when balanced: unlike the library's own, which
    takes the tokens of all layers for those of one.

    Args:
        router_logits: [T, E + M] of each MoE layer, T = B S.
        config: the model's.
        attention_mask: [B, S or more], 0 for padding, which is left out; of a longer one the last S columns count.

    Raises:
        ValueError: a mask of another form, which does not say which tokens are padding.
    """
    device = router_logits[0].device
    valid_T1 = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or router_logits[0].shape[0] % len(attention_mask):
            raise ValueError(
                f"the auxiliary loss needs an attention_mask [batch, length], got {list(attention_mask.shape)}: leave "
                "it out where there is no padding, or set output_router_logits=False"
            )
        length = router_logits[0].shape[0] // len(attention_mask)
        valid_T1 = (attention_mask[:, -length:] != 0).reshape(-1, 1).to(device)
    losses = [_layer(logits_TN.to(device), config, valid_T1) for logits_TN in router_logits]
    total = torch.stack(losses).sum()
    return total / len(losses) if config.router_aux_loss_reduction == "mean" else total


def _layer(logits_TN: Tensor, config: RmoeConfig, valid_T1: Tensor | None) -> Tensor:
    topk = config.num_experts_per_tok
    if config.router_score_function == "softmax":
        scores_TN = logits_TN.softmax(-1, dtype=torch.float32)
    else:
        scores_TN = logits_TN.float().sigmoid()
        scores_TN = scores_TN / (scores_TN.sum(-1, keepdim=True) + 1e-20)
    # the best scores: an expert bias is not looked at, as in Megatron
    counts_TN = torch.zeros_like(scores_TN).scatter(-1, scores_TN.topk(topk, dim=-1).indices, 1.0)
    if config.num_null_experts:
        counts_TN = balanced_choices(counts_TN, config.num_experts)
    tokens = len(logits_TN)
    if valid_T1 is not None:
        scores_TN, counts_TN, tokens = scores_TN * valid_T1, counts_TN * valid_T1, valid_T1.sum().clamp_min(1)
    return (scores_TN.sum(0) * counts_TN.sum(0)).sum() * (scores_TN.shape[1] / (topk * tokens * tokens))
