"""AdaMoE's definitions, against loops over tokens in float64."""

import math

import pytest
import torch

from rmoe_megablocks.routing.parts.null_experts import (
    SCORE_FUNCTIONS,
    balanced_choices,
    expected_real_experts,
    real_weights,
)

T, E, M, K = 40, 4, 3, 3
SCORES = {"softmax": math.exp, "sigmoid": lambda logit: 1 / (1 + math.exp(-logit))}


def drawn(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    logits_TN = torch.randn(T, E + M, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits_TN[0, :E] -= 10  # null experts alone
    logits_TN[1, E:] -= 10  # real ones alone
    return logits_TN


def chosen(logits_TN: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(logits_TN, dtype=torch.bool).scatter(1, logits_TN.topk(K).indices, True)


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_weights_are_scores_over_their_sum_of_the_chosen_real_experts(score_function):
    logits_TN = drawn()
    chosen_TN, expected = chosen(logits_TN), torch.zeros(T, E, dtype=torch.float64)
    for token, (logits, taken) in enumerate(zip(logits_TN.tolist(), chosen_TN.tolist(), strict=True)):
        scores = [SCORES[score_function](logits[i]) if taken[i] else 0.0 for i in range(E)]
        expected[token] = torch.tensor([s / sum(scores) if s else 0.0 for s in scores], dtype=torch.float64)
    found = real_weights(logits_TN, chosen_TN, E, score_function)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    counts = chosen_TN[:, :E].sum(-1)
    assert counts[0] == 0 and counts[1] == K and 0 < counts.double().mean() < K
    assert found[0].tolist() == [0.0] * E


@pytest.mark.parametrize("score_function", SCORE_FUNCTIONS)
def test_gradients(score_function):
    """Those of the definition, and zeros without a real expert."""
    logits_TN = drawn().requires_grad_()
    chosen_TN = chosen(logits_TN.detach())
    assert torch.autograd.gradcheck(lambda x: real_weights(x, chosen_TN, E, score_function), logits_TN)
    (gradient,) = torch.autograd.grad((real_weights(logits_TN, chosen_TN, E, score_function) ** 2).sum(), logits_TN)
    assert gradient.isfinite().all() and not gradient[0].any() and not gradient[:, E:].any() and gradient[1].any()


def test_a_null_expert_far_above_the_real_ones_leaves_their_weights_right():
    """Of scores over all, the real ones' would be 0 in fp32."""
    logits_TN = torch.tensor([[1.0, 0.0, -2000.0, -2000.0, 1000.0, -2000.0, -2000.0]])
    found = real_weights(logits_TN, chosen(logits_TN), E)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]]).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_computed_in_fp32_at_least(dtype):
    logits_TN = drawn(torch.float32).to(dtype)
    assert real_weights(logits_TN, chosen(logits_TN), E).dtype == torch.float32


def test_each_null_expert_counts_with_the_mean_load_of_all():
    chosen_TN = chosen(drawn())
    loads = balanced_choices(chosen_TN, E).double().sum(0)
    mean = chosen_TN[:, E:].sum().item() / M
    assert loads[:E].tolist() == chosen_TN[:, :E].sum(0).tolist()
    assert loads[E:].tolist() == pytest.approx([mean] * M, rel=1e-6)
    assert len(set(chosen_TN[:, E:].sum(0).tolist())) > 1  # their own loads are others
    assert balanced_choices(chosen_TN, E).sum(-1).tolist() == pytest.approx([K] * T, rel=1e-6)


def test_the_expectation_is_that_of_every_choice_alike():
    """Over all K of E + M."""
    choices = torch.combinations(torch.arange(E + M), K)
    assert expected_real_experts(K, E, M) == pytest.approx((choices < E).sum().item() / len(choices), rel=1e-12)
    assert expected_real_experts(K, E, 0) == K
