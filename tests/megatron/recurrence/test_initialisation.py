"""--moe-router-init in a Megatron model: with either router, and nothing else of the model changes."""

import math
from functools import partial

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.recurrence import install
from rmoe_megablocks.megatron.recurrence.router import FanInTopKRouter, RecurrentTopKRouter
from tests.distributed.arguments import LINEAR
from tests.megatron.recurrence import test_model as models

H, P = 48, 16
FAN_IN = ("--moe-router-init", "fan_in")


def build(*argv: str, **unchecked):
    """From the same random state each time."""
    model_parallel_cuda_manual_seed(1234)
    return models.build(*argv, **unchecked)


def routers(model) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def is_drawn_from(weight: torch.Tensor, inputs: int) -> bool:
    """Uniform in +-1/sqrt(inputs): BASE's init_method has standard deviation .15 and no bounds."""
    bound = 1 / math.sqrt(inputs)
    spread = weight.float().std().item() / (bound / math.sqrt(3))
    return 0.9 * bound < weight.abs().max() <= 1.004 * bound and 0.8 < spread < 1.2  # 1.004: bf16 rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(one_process, dtype):
    precision = ["--bf16"] * (dtype == torch.bfloat16)
    plain, model = build(*LINEAR, *precision), build(*LINEAR, *FAN_IN, *precision)
    assert {type(router) for router in routers(plain)} == {TopKRouter}
    assert {type(router) for router in routers(model)} == {FanInTopKRouter} and len(routers(model)) == 4
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    for name in before:
        if name.endswith("router.weight"):
            assert is_drawn_from(after[name], H) and not is_drawn_from(before[name], H), name
            assert after[name].shape == before[name].shape and after[name].dtype == before[name].dtype == dtype
        else:
            assert torch.equal(before[name], after[name]), name


def test_gru(one_process):
    plain, model = build("--moe-router-rnn-bias"), build("--moe-router-rnn-bias", *FAN_IN)
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after)
    drawn = set()
    for name in before:
        place, _, matrix = name.rpartition("routing_layer.")
        if place:
            drawn.add(matrix)
            inputs = H if matrix.startswith("projector") else P
            assert 0 < after[name].abs().max() <= 1 / math.sqrt(inputs), name
            assert not torch.equal(before[name], after[name]), name
        else:
            assert torch.equal(before[name], after[name]), name  # the shared cell too
    assert drawn == {"projector", "projector_bias", "router", "router_bias"}
    assert is_drawn_from(after["decoder.layers.3.mlp.router.routing_layer.projector"], H)


@pytest.mark.parametrize("others", [["--mtp-num-layers", "2"], ["--moe-layer-freq", "[0,1,0,1]"]])
def test_linear_in_all_layers_that_have_experts(one_process, others):
    model = build(*LINEAR, *FAN_IN, *others)
    found = routers(model)
    assert {type(router) for router in found} == {FanInTopKRouter} and len(found) == (6 if "2" in others else 2)
    assert all(is_drawn_from(router.weight, H) for router in found)
    plain = build(*LINEAR, *others)  # a hook that stays in Megatron knows the next model
    assert {type(router) for router in routers(plain)} == {TopKRouter}
    assert {type(router) for router in routers(build(*others))} == {RecurrentTopKRouter}


def test_linear_with_biases_and_without_initialisation(one_process, monkeypatch):
    monkeypatch.setattr(models, "BASE", [word for word in models.BASE if word != "--disable-bias-linear"])
    (first, *_) = routers(build(*LINEAR, *FAN_IN))
    assert 0 < first.bias.abs().max() <= 1 / math.sqrt(H) and first.bias.dtype == torch.float32
    asked = []
    monkeypatch.setattr("rmoe_megablocks.megatron.recurrence.router.fan_in_", lambda *drawn: asked.append(drawn))
    build(*LINEAR, *FAN_IN, perform_initialization=False)
    assert not asked


def test_linear_trains_as_its_weights_say(one_process):
    """The same weights give the same loss and gradients, whoever drew them."""
    plain, model = build(*LINEAR), build(*LINEAR, *FAN_IN)
    model.load_state_dict(plain.state_dict())
    expected, found = models.gradients(plain), models.gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_of_another_making_are_refused(one_process, monkeypatch):
    monkeypatch.setattr(install, "_fan_in_layer_spec", lambda spec: spec)
    with pytest.raises(UsageError, match="--moe-router-init fan_in: a TopKRouter cannot be drawn so"):
        build(*LINEAR, *FAN_IN)


def test_what_a_specification_says_besides_is_kept(one_process):
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    moe = MoESubmodules(experts=object(), shared_experts=object())
    spec = ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(mlp=partial(MoELayer, submodules=moe)))
    changed = install._fan_in_layer_spec(spec).submodules.mlp
    assert changed.func is MoELayer and changed.keywords["submodules"].router is FanInTopKRouter
    assert changed.keywords["submodules"].experts is moe.experts and moe.router is TopKRouter
