"""Folders of weights: what is in them, back bit for bit, frozen weights, missing ones, dtypes; initial weights."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rmoe_megablocks.huggingface import RmoeForCausalLM, RmoeModel
from rmoe_megablocks.huggingface.initial_weights import build_shared
from rmoe_megablocks.routing import HEAD, INIT, LINEAR, SHARE_HEAD, get_router_type
from tests.huggingface.built import TYPES, M, close, config, having, model, routers, spelt, tokens

SHARED_HEADS = [(name, {SHARE_HEAD: "all", HEAD: "cosine"}) for name in having(SHARE_HEAD)[:1]]
KINDS = [*((name, {}) for name in TYPES), *SHARED_HEADS]


@pytest.fixture
def uninitialised_is_nan():
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def same_tensors(ours, theirs) -> None:
    ours, theirs = (dict([*made.named_parameters(), *made.named_buffers()]) for made in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad, name


@pytest.mark.parametrize("name, options", KINDS, ids=spelt)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, name, options):
    made = model(name, options, num_null_experts=M)
    made.save_pretrained(tmp_path)
    found, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(found) is RmoeForCausalLM and not any(told.values())
    same_tensors(found, made)
    assert found.config.to_dict() | {"_name_or_path": ""} == made.config.to_dict()
    close(found(tokens()).logits, made(tokens()).logits, 1e-4)  # products depend on where in memory weights lie


@pytest.mark.parametrize("kinds", [{}, dict(tie_word_embeddings=True, attention_bias=True, qk_norm=True,
                                            router_score_function="sigmoid", router_enable_expert_bias=True,
                                            moe_shared_expert_gate=True)], ids=["plain", "all"])  # fmt: skip
def test_names_of_the_folder(tmp_path, kinds):
    made = model(**kinds)
    made.save_pretrained(tmp_path)
    found = {re.sub(r"layers\.\d+", "layers.*", name) for name in load_file(tmp_path / "model.safetensors")}
    layer = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
    mlps = ["mlp", "mlp.shared_experts"]
    names = [f"{x}.weight" for x in layer] + [f"{m}.{x}_proj.weight" for m in mlps for x in ("gate", "up", "down")]
    names += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    names += [f"mlp.router.layer.{name}" for name, _ in routers(made)[0].layer.named_parameters()]
    if kinds:
        names += [f"self_attn.{x}_proj.bias" for x in "qkv"] + ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        names += ["mlp.router.expert_bias", "mlp.shared_experts_gate.weight"]
    expected = {f"model.layers.*.{name}" for name in names} | {"model.embed_tokens.weight", "model.norm.weight"}
    expected |= {f"model.shared_router.{name}" for name, _ in build_shared(made.config).named_parameters()}
    assert found == expected | (set() if kinds else {"lm_head.weight"})
    assert model(LINEAR).state_dict()["model.layers.1.mlp.router.weight"].shape == (4, 32)


def test_auto_classes():
    assert type(AutoModel.from_config(config())) is RmoeModel
    assert type(AutoConfig.for_model("rmoe")).__name__ == "RmoeConfig"


@pytest.mark.parametrize("name, options", KINDS, ids=spelt)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_drawn(uninitialised_is_nan, name, options, dtype):
    """In bf16 too, where orthogonal matrices cannot be drawn as such."""
    made = AutoModelForCausalLM.from_config(config(name, options), dtype=dtype)
    for key, tensor in made.named_parameters():
        assert tensor.isfinite().all(), key
        assert tensor.dtype == dtype, key


@pytest.mark.parametrize("name, options", [*KINDS, *((name, {INIT: "fan_in"}) for name in TYPES)], ids=spelt)
def test_routing_is_drawn_as_routing_draws_it(name, options):
    made = RmoeForCausalLM(config(name, options))
    kind, routing = made.config.routing()
    router = routers(made)[0]
    torch.manual_seed(5)
    made._init_weights(router)
    torch.manual_seed(5)
    if router.layer is None:
        expected = torch.empty_like(router.weight)
        torch.nn.init.uniform_(expected, -(32**-0.5), 32**-0.5) if options else expected.normal_(std=0.2)
        assert router.weight.equal(expected)
    else:
        same_tensors(router.layer, kind.build_layer(routing))
    if made.model.shared_router is not None:
        torch.manual_seed(6)
        made._init_weights(made.model)
        torch.manual_seed(6)
        same_tensors(made.model.shared_router, kind.build_shared(routing))


@pytest.mark.parametrize("name, options", KINDS, ids=spelt)
def test_missing_weights_are_drawn_and_the_others_kept(tmp_path, uninitialised_is_nan, name, options):
    made = model(name, options)
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    mine = [key for key in weights if ".router." in key or "shared_router" in key]
    missing = {key for key in mine if "layers.2." in key or "shared_router" in key}
    kept_of_layer = sorted(key for key in missing if "layers.2." in key)[1:]
    missing -= set(kept_of_layer)  # of one module some are there
    save_file({key: value for key, value in weights.items() if key not in missing}, file, {"format": "pt"})
    found, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == missing
    for key, tensor in found.state_dict().items():
        assert tensor.isfinite().all(), key
        assert key in missing or tensor.equal(weights[key]), key
    drawn = [key for key in missing if weights[key].numel() > 20]
    assert all(not found.state_dict()[key].equal(weights[key]) for key in drawn)
    frozen = {key for key, p in made.named_parameters() if not p.requires_grad}
    assert {key for key, p in found.named_parameters() if not p.requires_grad} == frozen
    assert bool(frozen) == any(not p.requires_grad for p in _own(made).parameters())


def _own(made):
    kind, routing = made.config.routing()
    return kind.layer(routing) if get_router_type(made.config.router_type).replaces_hosts else torch.nn.Module()


def test_the_expert_bias_stays_exact(tmp_path):
    made = model(router_score_function="sigmoid", router_enable_expert_bias=True)
    expected = routers(made)[0].expert_bias.clone()
    assert not expected.equal(expected.bfloat16().float())
    made.save_pretrained(tmp_path)
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        model(router_score_function="sigmoid", router_enable_expert_bias=True).to(torch.bfloat16),
        model(router_score_function="sigmoid", router_enable_expert_bias=True).half(),
    ):
        assert found.lm_head.weight.dtype != torch.float32
        assert routers(found)[0].expert_bias.equal(expected)
