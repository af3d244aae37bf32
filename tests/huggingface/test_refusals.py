"""What would be wrong without a word is one line that names it."""

import types

import pytest

from rmoe_megablocks.huggingface import RmoeConfig, RmoeForCausalLM, RmoePreTrainedModel, release
from rmoe_megablocks.routing import RESIDUAL, STATE_SIZE
from tests.huggingface.built import config, model

BAD = [
    (dict(router_type="grue"), "did you mean gru?"),
    (dict(router_type="not_there.mine:Router"), "import not_there.mine before"),
    (dict(router_options={"moe_router_rnn_size": 3}), "moe_router_rnn_size is no argument of router_type 'gru'"),
    (dict(router_type="linear", router_options={STATE_SIZE.dest: 3}), "no argument of router_type 'linear' but of"),
    (dict(router_options={STATE_SIZE.dest: 0}), "must be at least 1, got 0"),
    (dict(router_type="product_key", router_options={}, num_experts=5), "square number of experts"),
    (dict(router_score_function="sqrtsoftplus"), "router_score_function must be one of softmax, sigmoid"),
    (dict(router_aux_loss_reduction="max"), "router_aux_loss_reduction must be one of sum, mean"),
    (dict(router_dtype="bfloat16"), "router_dtype must be one of None, float32, float64"),
    (dict(router_pre_softmax=True, router_score_function="sigmoid"), "router_pre_softmax needs"),
    (dict(router_enable_expert_bias=True), "router_enable_expert_bias needs router_score_function sigmoid"),
    (dict(num_experts_per_tok=1), "num_experts_per_tok 1 needs router_pre_softmax"),
    (dict(num_experts_per_tok=5), "num_experts_per_tok must be between 1 and num_experts (4)"),
    (dict(num_null_experts=-1), "num_null_experts must be at least 0"),
    (dict(num_null_experts=2, router_pre_softmax=True), "num_null_experts does not work with router_pre_softmax"),
    (dict(num_null_experts=2, router_score_function="sigmoid", num_experts_per_tok=1), "num_experts_per_tok 1"),
    (dict(moe_shared_expert_gate=True, moe_shared_expert_intermediate_size=None), "there is no shared expert"),
    (dict(moe_layer_freq=[1, 1]), "a 0 or a 1 for each of the 5 layers"),
    (dict(moe_layer_freq=[0, 1, 2, 1, 1]), "a 0 or a 1 for each of the 5 layers"),
    (dict(num_key_value_heads=3), "must be a multiple of num_key_value_heads (3)"),
    (dict(router_options={RESIDUAL.dest: 0.5}, router_pre_softmax=True), "moe_router_residual does not work with"),
    (dict(router_options={RESIDUAL.dest: 0.5}, router_score_function="sigmoid"), "scores of a softmax"),
    (dict(router_num_groups=2), "router_num_groups is no option of RmoeConfig"),
    (dict(moe_router_group_topk=1), "moe_router_group_topk is no option"),
    (dict(router_topk_scaling_factr=2.0), "router_topk_scaling_factr is no option"),
    (dict(router_z_loss_coef=1e-3), "router_z_loss_coef is no option"),
]


@pytest.mark.parametrize("changes, line", BAD, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_configurations(changes, line):
    with pytest.raises(ValueError) as caught:
        config(**changes)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    (tmp_path / "surprise.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.chdir(tmp_path)
    values = config().to_dict() | {"router_type": "surprise:Router", "router_options": {}}
    with pytest.raises(ValueError, match="import surprise before the model is made"):
        RmoeConfig.from_dict(values)


def test_pipeline_stages(tmp_path):
    made = model()
    stages = types.SimpleNamespace(pp_size=2, tp_size=1)
    with pytest.raises(ValueError, match="pp_size=2: the library's pipeline stages would lose the routing state"):
        RmoeForCausalLM.maybe_distribute_model(made, stages, None)
    assert RmoeForCausalLM.maybe_distribute_model(made, None, None) is made
    assert not made.supports_pp_plan


def test_flash_attention_was_not_tried():
    with pytest.raises(ValueError, match="(?i)flash"):
        RmoeForCausalLM._from_config(config(), attn_implementation="flash_attention_2")


def test_releases():
    release.check()
    with pytest.raises(ImportError, match="needs transformers 5.17 or later, this is 5.2.0"):
        release.check(version="5.2.0")
    for name in release.TOUCHED:
        assert name in vars(RmoePreTrainedModel)
        without = type("Model", (), {other: None for other in release.TOUCHED if other != name})
        with pytest.raises(ImportError, match=f"no PreTrainedModel.{name} any more"):
            release.check(without)
