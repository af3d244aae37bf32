"""AdaMoE's null experts (arXiv 2406.13233): M logits beside the E of experts, for experts that do nothing.

A token's K best of E + M logits hold 0 to K real experts. The real ones come first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: scores whose weights, normalised over the chosen real experts, are a softmax of this
_LOGARITHMS = {"softmax": lambda logits: logits, "sigmoid": F.logsigmoid}
SCORE_FUNCTIONS = tuple(_LOGARITHMS)


def real_weights(logits_TN: Tensor, chosen_TN: Tensor, experts: int, score_function: str = "softmax") -> Tensor:
    """Weights [T, E] of the chosen real experts: their scores, divided by their sum.

    Computed from logits: a null expert far above the real ones would leave scores of 0 to divide. A token without a
    real expert has weights of 0, and its logits gradients of 0 from here.

    Args:
        logits_TN: logits [T, E + M].
        chosen_TN: bool, which of them are among the K best.
        experts: E.
        score_function: one of :data:`SCORE_FUNCTIONS`.

    Returns:
        at least fp32.
    """
    wide = torch.promote_types(logits_TN.dtype, torch.float32)
    logs_TE = _LOGARITHMS[score_function](logits_TN[:, :experts].to(wide))
    chosen_TE = chosen_TN[:, :experts]
    # of a token without a real expert all are kept: the softmax of nothing is 0/0, and so is its gradient
    kept_TE = chosen_TE | ~chosen_TE.any(-1, keepdim=True)
    return logs_TE.masked_fill(~kept_TE, -torch.inf).softmax(-1) * chosen_TE


def balanced_choices(chosen_TN: Tensor, experts: int) -> Tensor:
    """Choices [T, E + M] as the balancing loss counts them, fp32: each null expert with the mean of all of them.

    Nothing tells null experts from each other, so nothing shall spread tokens over them: AdaMoE's f_i of a null
    expert is their mean load. Rows and their sum keep their meaning, K choices a token.
    """
    counts_TN = chosen_TN.float()
    null_T1 = counts_TN[:, experts:].mean(-1, keepdim=True)
    return torch.cat((counts_TN[:, :experts], null_T1.expand(-1, counts_TN.shape[1] - experts)), dim=-1)


def expected_real_experts(topk: int, experts: int, null_experts: int) -> float:
    """Real experts of a token where all E + M are chosen alike."""
    return topk * experts / (experts + null_experts)
