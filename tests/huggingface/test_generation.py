"""Caches, generation, padding and the implementations of attention and experts: all give the same numbers."""

import os

import pytest
import torch

from rmoe_megablocks.huggingface.cache import CACHE
from tests.huggingface.built import LINEAR_AND_STATEFUL, M, S, cache_of, close, model, tokens

FORMS = {
    "grouped queries, dense layers": {},
    "one group, biases, norms of q and k, tied": dict(
        num_key_value_heads=1, attention_bias=True, qk_norm=True, tie_word_embeddings=True, head_dim=12
    ),
    "sigmoid and bias, gated shared expert": dict(
        router_score_function="sigmoid", router_enable_expert_bias=True, moe_shared_expert_gate=True
    ),
    "null experts, half of a head rotated": dict(
        num_null_experts=M, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "no shared expert, pre-softmax, scaled": dict(
        moe_shared_expert_intermediate_size=None, router_pre_softmax=True, router_topk_scaling_factor=2.5
    ),
}


@pytest.mark.parametrize("name", LINEAR_AND_STATEFUL)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_piece_by_piece_equals_at_once(name, form):
    made, ids = model(name, **FORMS[form]), tokens()
    whole = made(ids, use_cache=False).logits
    cache, parts = None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, S)):
        out = made(ids[:, start:stop], use_cache=True, **{CACHE: cache})
        cache = cache_of(out)
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole, 2e-5)
    assert whole.std() > 0.3


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_attention_and_experts_by_every_implementation(form):
    made, ids = model(**FORMS[form]), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = {}
    for attention in ("sdpa", "eager"):
        for experts in ("eager", "grouped_mm", "batched_mm"):
            made.set_attn_implementation(attention)
            made.set_experts_implementation(experts)
            results[attention, experts] = made(ids, attention_mask=mask).logits[mask.bool()]
    first, *others = results.values()
    for other in others:
        close(other, first, 2e-5)


def test_implementations_are_those_that_were_asked_for(monkeypatch):
    from rmoe_megablocks.huggingface.layers import attention

    made = model()
    made.set_attn_implementation("eager")
    assert made(tokens(), output_attentions=True).attentions[0].shape == (2, 4, S, S)
    made.set_attn_implementation("sdpa")
    monkeypatch.setattr(attention, "eager_attention", None)  # not called any more
    made.set_experts_implementation("eager")
    made.model.layers[1].mlp.experts.gate_up_proj = None
    with pytest.raises(TypeError):
        made(tokens())


@pytest.mark.skipif(os.environ.get("RMOE_TEST_TRANSFORMERS") != "1", reason="minutes; RMOE_TEST_TRANSFORMERS=1")
@torch.no_grad()
def test_flex_attention():
    made, ids = model(), tokens(length=16)
    expected = made(ids).logits
    made.set_attn_implementation("flex_attention")
    close(made(ids).logits, expected, 2e-5)


@pytest.mark.parametrize("name", LINEAR_AND_STATEFUL)
def test_generation_with_and_without_a_cache(name):
    made, ids = model(name), tokens(length=4)
    common = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for further in ({}, {"num_beams": 3}):
        plain = made.generate(ids, use_cache=False, **common, **further)
        assert plain.shape == (2, 10)
        for cached in ({}, {"cache_implementation": "static"}):
            if cached and further:
                continue
            assert made.generate(ids, **common, **further, **cached).equal(plain)


@torch.no_grad()
def test_left_padding_changes_nothing():
    made, ids = model(), tokens()
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    expected = made(ids).logits
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    close(made(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], expected, 2e-5)
    close(made(padded, attention_mask=mask).logits[:, 3:], expected, 2e-5)  # rotary positions are relative
    new = made.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert new[:, 3:].equal(made.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


@torch.no_grad()
def test_recorded_outputs():
    made = model()
    out = made(tokens(), output_hidden_states=True, output_router_logits=True)
    assert [h.shape for h in out.hidden_states] == [(2, S, 32)] * 6
    assert [x.shape for x in out.router_logits] == [(2 * S, 4)] * 3
    close(made.lm_head(out.hidden_states[-1]), out.logits, 1e-6)
    close(made(tokens(), logits_to_keep=2).logits, out.logits[:, -2:], 1e-6)
    assert made(inputs_embeds=made.model.embed_tokens(tokens())).logits.equal(out.logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        made(tokens(), inputs_embeds=made.model.embed_tokens(tokens()))
