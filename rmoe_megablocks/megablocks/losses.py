"""Load balancing and router z-loss of one layer, as values that the layer returns.

MegaBlocks collects both in global lists. A list is filled by whatever runs: with reentrant recompute by a forward
without a graph, so that the loss has no gradient; twice by two forwards before a loss; in no_grad too, where nobody
empties it. Attaching a loss to an output, as Megatron does, mends that but not its scale: whoever divides the loss by
the number of accumulated batches, or multiplies it by an fp16 loss scale, does not reach it.

So the loss is an output of the layer. It is recomputed, averaged, scaled and thrown away with the forward that made it,
and ``(loss + aux_loss).backward()`` is all there is to do.
"""

import torch
from torch import Tensor


def load_balancing_loss(scores_TE: Tensor, tokens_per_expert: Tensor, top_k: int) -> Tensor:
    """E times the sum over experts of (share of the choices) * (mean score); 1 when balanced, 0 without tokens.

    Args:
        scores_TE: softmax scores [T, E]; gradients flow through these alone.
        tokens_per_expert: [E], how many choices fell on each expert.
        top_k: choices of a token.

    Returns:
        fp32 scalar, as megablocks.layers.moe.batched_load_balancing_loss for one layer and weight 1.
    """
    tokens, experts = scores_TE.shape
    tokens = max(tokens, 1)
    mean_E = scores_TE.sum(0, dtype=torch.float32) / tokens
    return torch.dot(tokens_per_expert.float(), mean_E) * (experts / (tokens * top_k))


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean square of the logits' logsumexp over tokens, fp32 scalar; 0 without tokens. logits [T, E]."""
    return logits_TE.float().logsumexp(-1).square().sum() / max(logits_TE.shape[0], 1)
