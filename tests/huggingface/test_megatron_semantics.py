"""Choice, weights and balancing loss against Megatron's own functions."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)

from rmoe_megablocks.huggingface.layers.balancing import load_balancing_loss
from rmoe_megablocks.huggingface.layers.moe import choose
from rmoe_megablocks.routing.parts.null_experts import balanced_choices, real_weights
from tests.huggingface.built import LINEAR_AND_STATEFUL, B, E, K, M, S, close, config, model, tokens

SCORES = {
    "softmax of the chosen": {},
    "softmax of all": dict(router_pre_softmax=True),
    "one expert": dict(router_pre_softmax=True, num_experts_per_tok=1),
    "sigmoid": dict(router_score_function="sigmoid"),
    "one sigmoid": dict(router_score_function="sigmoid", num_experts_per_tok=1),
    "sigmoid and bias": dict(router_score_function="sigmoid", router_enable_expert_bias=True),
    "scaled": dict(router_topk_scaling_factor=2.5),
}


def logits_of(seed: int, experts: int = E, dtype=torch.float32):
    return torch.randn(B * S, experts, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


def dense(weights_TK, experts_TK, experts: int = E):
    """[T, E], 0 for what was not chosen."""
    return torch.zeros(len(weights_TK), experts, dtype=weights_TK.dtype).scatter_add(-1, experts_TK, weights_TK)


@pytest.mark.parametrize("form", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_and_weights_are_megatrons(form, dtype):
    settings = config(**SCORES[form])
    logits = logits_of(1, dtype=dtype)
    biased = settings.router_enable_expert_bias
    bias = torch.tensor([0.3, -0.2, 0.0, 0.5]) if biased else None
    expected, chosen = topk_routing_with_score_function(
        logits,
        settings.num_experts_per_tok,
        use_pre_softmax=settings.router_pre_softmax,
        scaling_factor=settings.router_topk_scaling_factor,
        score_function=settings.router_score_function,
        expert_bias=bias,
    )
    weights_TK, experts_TK = choose(logits, settings, bias)
    assert weights_TK.dtype == dtype
    close(dense(weights_TK, experts_TK), expected, 0 if dtype == torch.bfloat16 else 1e-7)
    assert dense(torch.ones_like(weights_TK), experts_TK).bool().equal(chosen)
    if biased:
        assert not choose(logits, settings)[1].sort().values.equal(experts_TK.sort().values)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_null_experts_are_those_of_the_megatron_host(function):
    settings = config(num_null_experts=M, router_score_function=function)
    logits = logits_of(2, E + M)
    _, chosen = topk_routing_with_score_function(logits, K, score_function=function)
    weights_TK, experts_TK = choose(logits, settings)
    assert experts_TK.max() < E
    close(dense(weights_TK, experts_TK), real_weights(logits, chosen, E, function), 1e-7)
    real = chosen[:, :E].sum(-1)
    assert set(real.tolist()) == {0, 1, 2} and (weights_TK != 0).sum(-1).equal(real)


def megatrons_loss(logits, settings, padding=None):
    """Of one layer, as TopKRouter (and the host's NullExperts) puts it together from the two functions."""
    scores, chosen = None, None
    chosen, scores = compute_routing_scores_for_aux_loss(
        logits, settings.num_experts_per_tok, settings.router_score_function, padding_mask=padding
    )
    counts = balanced_choices(chosen, E) if settings.num_null_experts else chosen.float()
    return switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=counts.sum(0),
        total_num_tokens=len(logits) if padding is None else int((~padding).sum()),
        topk=settings.num_experts_per_tok,
        num_experts=logits.shape[1],
        moe_aux_loss_coeff=1.0,
    )


@pytest.mark.parametrize("form", [*SCORES, "null experts"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_is_megatrons_layer_by_layer(form, reduction, padded):
    further = SCORES.get(form, dict(num_null_experts=M))
    settings = config(router_aux_loss_reduction=reduction, **further)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, :4] = 0
    layers = [logits_of(seed, settings.router_logits) for seed in (3, 4, 5)]
    padding = (mask == 0).flatten() if padded else None
    each = torch.stack([megatrons_loss(logits, settings, padding) for logits in layers])
    found = load_balancing_loss(tuple(layers), settings, mask if padded else None)
    close(found, each.sum() if reduction == "sum" else each.mean(), 1e-6)
    pooled = megatrons_loss(torch.cat(layers), settings, None if padding is None else padding.repeat(3))
    assert abs(each.mean() - pooled) > 1e-3  # what the library's own function computes


def test_a_mask_that_does_not_say_what_is_padding_is_refused():
    layers = (logits_of(3),)
    for mask in (torch.ones(B, 1, S, S), torch.ones(4, S)):
        with pytest.raises(ValueError, match=r"attention_mask \[batch, length\]"):
            load_balancing_loss(layers, config(), mask)
    longer = torch.cat((torch.zeros(B, 7), torch.ones(B, S)), 1)  # of a cache
    assert load_balancing_loss(layers, config(), longer).equal(load_balancing_loss(layers, config()))


@pytest.mark.parametrize("name", LINEAR_AND_STATEFUL)
def test_the_models_loss_has_it_with_its_coefficient(name):
    made = model(name, router_aux_loss_coef=0.3)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, 6:] = 0
    labels = tokens().masked_fill(mask == 0, -100)
    plain = made(tokens(), attention_mask=mask, labels=labels)
    both = made(tokens(), attention_mask=mask, labels=labels, output_router_logits=True)
    assert plain.aux_loss is None and plain.router_logits is None
    expected = sum(megatrons_loss(x, made.config, (mask == 0).flatten()) for x in both.router_logits)
    close(both.aux_loss, expected, 1e-5)
    close(both.loss, plain.loss + 0.3 * expected, 1e-5)


def test_a_batch_in_parts_weighs_each_parts_auxiliary_loss_by_its_tokens():
    made = model(router_aux_loss_coef=0.3)
    labels = [tokens(seed=seed) for seed in (1, 2)]
    labels[1][:, 4:] = -100
    items = [int((part[:, 1:] != -100).sum()) for part in labels]
    outputs = [
        made(tokens(seed=seed), labels=part, output_router_logits=True, num_items_in_batch=torch.tensor(sum(items)))
        for seed, part in zip((1, 2), labels, strict=True)
    ]
    alone = [
        made(tokens(seed=seed), labels=part, output_router_logits=True)
        for seed, part in zip((1, 2), labels, strict=True)
    ]
    expected = sum(out.loss * n for out, n in zip(alone, items, strict=True)) / sum(items)
    close(sum(out.loss for out in outputs), expected, 1e-5)
