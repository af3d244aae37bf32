"""MegaBlocks' experts in a Megatron MoE layer of one process, beside Megatron's own with the same weights."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import default_layer_spec

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.experts.megablocks_experts import MegaBlocksExperts
from rmoe_megablocks.megatron.experts.megablocks_layer import MegaBlocksMoELayer, RecurrentMegaBlocksMoELayer
from rmoe_megablocks.megatron.experts.megablocks_weights import from_megatron, to_megatron
from rmoe_megablocks.megatron.recurrence import install
from rmoe_megablocks.megatron.recurrence.layer import RecurrentMoELayer
from tests.distributed.arguments import BASE, of_type
from tests.megatron.conftest import one_process  # noqa: F401

S, B, H = 32, 2, 48
WITHOUT_SWIGLU = [word for word in BASE if word != "--swiglu"]
TOP_1 = "--moe-router-topk 1 --moe-router-pre-softmax".split()
VARIANTS = {
    "swiglu": BASE,
    "gelu": WITHOUT_SWIGLU,
    "squared relu": [*WITHOUT_SWIGLU, "--squared-relu"],
    "shared experts": [*BASE, "--moe-shared-expert-intermediate-size", "32"],
    "odd sizes": [*BASE, *"--moe-ffn-hidden-size 35 --num-experts 5 --moe-router-topk 3".split()],
    "one expert": [*BASE, *"--num-experts 1 --moe-ffn-hidden-size 128".split(), *TOP_1],
    "sinkhorn": [*BASE, *"--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0".split()],
    "fp64 router": [*BASE, "--moe-router-dtype", "fp64"],
    "cpu initialization": [*BASE, "--use-cpu-initialization"],
    "bf16": [*BASE, *"--bf16 --moe-router-dtype fp32".split()],
}
TOLERANCE = {"bf16": 2e-2}


def configuration(backend: str, router: str, words: list[str]):
    args = arguments.parse([*words, "--eval-interval", "100", *of_type(router), "--moe-backend", backend])
    arguments.fill_defaults(args)
    arguments.validate(args)
    model_config = gpt_config_from_args(args)
    install.install_router(model_config, args)
    return model_config


def layer(backend: str, words: list[str], router: str = "linear") -> MoELayer:
    """The model's first MoE layer, as its transformer layer would build it."""
    model_config = configuration(backend, router, words)
    spec = model_config.transformer_layer_spec or default_layer_spec
    build = spec(model_config, None).layer_specs[0].submodules.mlp
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    result = build(config=model_config.transformer, pg_collection=groups, is_mtp_layer=False)
    result.set_layer_number(1)
    return result


def tensors(layer: MoELayer, of) -> dict[str, torch.Tensor]:
    """What ``of`` finds for each parameter, under the names of Megatron's experts."""
    found = {name: of(parameter) for name, parameter in layer.named_parameters()}
    return found if type(layer) is MoELayer else to_megatron(found, layer.num_local_experts)


def run(layer: MoELayer, padding_mask: torch.Tensor | None):
    """Output, gradient of the input and of the parameters."""
    generator = torch.Generator().manual_seed(1)
    dtype = layer.config.params_dtype
    x, grad = (torch.randn(S, B, H, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    output, bias = layer(x, padding_mask=padding_mask)
    assert bias is None and output.dtype == dtype and output.shape == x.shape
    output.backward(grad)
    return output, x.grad, tensors(layer, lambda parameter: parameter.grad)


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    assert (ours.float() - expected.float()).norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padding mask"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_what_megatrons_experts_compute(one_process, variant, padded):  # noqa: F811
    megatron, ours = layer("megatron", VARIANTS[variant]), layer("megablocks", VARIANTS[variant])
    assert type(megatron.experts) is SequentialMLP and type(ours.experts) is MegaBlocksExperts
    mask = torch.arange(S).expand(B, S) >= S - 10 if padded else None
    results = [run(layer, mask) for layer in (megatron, ours)]
    (expected, expected_grad, expected_grads), (output, grad, grads) = results
    tolerance = TOLERANCE.get(variant, 1e-5)
    assert_close(output, expected, tolerance)
    assert_close(grad, expected_grad, tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        assert gradient.abs().sum() > 0 or variant == "one expert"
        assert_close(gradient, expected_grads[name], tolerance)


@pytest.mark.parametrize("variant", ["swiglu", "gelu", "cpu initialization", "bf16"])
def test_starts_as_megatrons_experts_do(one_process, variant):  # noqa: F811
    megatron, ours = (
        tensors(layer(backend, VARIANTS[variant]), torch.Tensor.detach) for backend in ("megatron", "megablocks")
    )
    assert megatron.keys() == ours.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in megatron.items())


@pytest.mark.parametrize("variant", ["swiglu", "gelu", "bf16"])
def test_state_dicts_move_both_ways_exactly(one_process, variant):  # noqa: F811
    megatron, ours = layer("megatron", VARIANTS[variant]), layer("megablocks", VARIANTS[variant])
    ours.experts.reset_parameters()
    state = from_megatron(megatron.state_dict(), gated=ours.config.gated_linear_unit)
    assert ours.load_state_dict(state) == ([], [])
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items() if value is not None)
    back = to_megatron(ours.state_dict(), ours.num_local_experts)
    expected = {name: value for name, value in megatron.state_dict().items() if value is not None}
    assert back.keys() == expected.keys() and all(torch.equal(value, back[name]) for name, value in expected.items())


@pytest.mark.parametrize("singleton", [False, True], ids=["", "singleton shards"])
@pytest.mark.parametrize("variant", ["swiglu", "gelu"])
def test_checkpoints_have_megatrons_layout(one_process, variant, singleton):  # noqa: F811
    def shards(layer: MoELayer, key: str) -> dict:
        metadata = {
            "singleton_local_shards": singleton,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        described = layer.sharded_state_dict("decoder.layers.mlp.", ((0, 1, 4),), metadata)
        for factory in nested_values(described):
            if isinstance(factory, ShardedTensorFactory):  # as an optimizer names its state
                factory.key = f"{key}{factory.key}"
        apply_factories(described)
        result = {}
        for shard in nested_values(described):
            if isinstance(shard, ShardedObject):
                result[shard.unique_key] = shard.data
            else:
                place = (shard.key.removeprefix(key), shard.global_shape, shard.global_offset)
                result[place] = (shard.axis_fragmentations, shard.prepend_axis_num, shard.replica_id, shard.data)
        return result

    ours = layer("megablocks", VARIANTS[variant])
    expected = shards(layer("megatron", VARIANTS[variant]), "")
    for key in ("", "optimizer.state.exp_avg."):
        found = shards(ours, key)
        assert found.keys() == expected.keys()
        for place, shard in expected.items():
            if isinstance(shard, tuple):
                assert found[place][:-1] == shard[:-1] and torch.equal(found[place][-1], shard[-1])


def test_optimizer_state_of_an_older_megatron_is_refused(one_process):  # noqa: F811
    described = layer("megablocks", BASE).sharded_state_dict("decoder.layers.mlp.", ((0, 1, 4),), {})
    factory = next(value for value in nested_values(described) if isinstance(value, ShardedTensorFactory))
    factory.flattened_range = slice(0, 4)  # as distrib_optimizer.py:2037 sets it for checkpoints of older releases
    with pytest.raises(UsageError, match="--no-load-optim"):
        factory.build()


def test_megatron_knows_the_weights_as_experts(one_process):  # noqa: F811
    megatron, ours = layer("megatron", BASE), layer("megablocks", BASE)
    expected = megatron.experts.local_experts[0].linear_fc1.weight
    for parameter in ours.experts.parameters():
        for name in ("allreduce", "tensor_model_parallel", "partition_dim"):
            assert getattr(parameter, name) == getattr(expected, name)
        assert parameter.dtype == expected.dtype and not parameter.is_meta


def test_megablocks_keeps_no_losses_of_its_own(one_process):  # noqa: F811
    from megablocks.layers import moe, router

    run(layer("megablocks", BASE), None)
    assert moe.get_load_balancing_loss() == [] and router._ROUTER_LOGITS == []


@pytest.mark.parametrize(
    ("backend", "router", "kind"),
    [
        ("megatron", "linear", MoELayer),
        ("megatron", "gru", RecurrentMoELayer),
        ("megablocks", "linear", MegaBlocksMoELayer),
        ("megablocks", "gru", RecurrentMegaBlocksMoELayer),
    ],
)
def test_every_router_goes_with_either_backend(one_process, backend, router, kind):  # noqa: F811
    assert type(layer(backend, BASE, router)) is kind


def test_dense_layers_stay_as_they_are(one_process):  # noqa: F811
    model_config = configuration("megablocks", "gru", [*BASE, "--moe-layer-freq", "[0,1,1,1]"])
    kinds = [
        getattr(spec.submodules.mlp, "func", None)
        for spec in model_config.transformer_layer_spec(model_config, None).layer_specs
    ]
    assert kinds[0] is not RecurrentMegaBlocksMoELayer and kinds[1:] == [RecurrentMegaBlocksMoELayer] * 3
