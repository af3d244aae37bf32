"""Memory estimates against what is there: bytes of weights, gradients and optimizer, and what autograd keeps."""

from dataclasses import replace

import pytest
import torch

from rmoe_megablocks.launcher.config import REPOSITORY
from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.planning import read_settings
from rmoe_megablocks.planning.counts import memory, parameters
from tests.planning.built import arguments, build, checked, rank_of

from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip  after CPU mode
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

TINY = REPOSITORY / "configs" / "tiny.yaml"
ONE = "--pipeline-model-parallel-size 1 --global-batch-size 64 "


@pytest.mark.parametrize(
    ("typed", "world_size"),
    [
        (ONE, 1),
        (ONE + "--bf16", 1),
        (ONE + "--bf16 --use-distributed-optimizer", 4),
        (ONE + "--bf16 --use-distributed-optimizer --expert-model-parallel-size 2", 4),
        (ONE + "--bf16 --use-distributed-optimizer --moe-router-type hyper", 4),
        (ONE + "--bf16 --moe-router-type random", 1),
        (ONE + "--use-distributed-optimizer --moe-router-type linear --moe-router-rnn-hidden-size=null", 2),
    ],
)
def test_weights_gradients_and_optimizer(typed, world_size, tmp_path):
    run = checked(TINY, tmp_path, typed.split(), world_size)
    args = run.args
    settings = read_settings(arguments(TINY, typed.split())[0])
    estimate = memory.on_rank(settings, world_size, 0)
    with rank_of(run, 0) as groups:
        model_config = gpt_config_from_args(args)
        install_router(model_config, args)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=args.use_distributed_optimizer,
            grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        )
        chunks = GPTModelBuilder(model_config).build_distributed_models(
            groups, ddp, data_parallel_random_init=False, mixed_precision_wrapper=Float16Module if args.bf16 else None
        )
        config = OptimizerConfig(
            lr=1e-3,
            bf16=args.bf16,
            params_dtype=args.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
        )
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
        buffers = [*chunks[0].buffers, *chunks[0].expert_parallel_buffers]
        # what has no gradient yet gets its state in the first step
        for buffer in buffers:
            buffer.grad_data.fill_(1e-3)
        optimizer.step()
        state = 0
        for single in getattr(optimizer, "chained_optimizers", [optimizer]):
            state += sum(
                value.numel() * value.element_size()
                for values in single.optimizer.state.values()
                for value in values.values()
                if torch.is_tensor(value) and value.dim()
            )
            if args.bf16:  # the optimizer's own copy of the weights
                state += sum(4 * p.numel() for group in single.optimizer.param_groups for p in group["params"])
        parts = chunks[0].parameters()
        weights = sum(parameter.numel() * parameter.element_size() for parameter in parts)
        gradients = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
    assert estimate.weights == weights
    # buffers and shards are padded, to multiples of 64 elements a parameter and 128 a rank and bucket
    assert estimate.gradients == pytest.approx(gradients, rel=0.01)
    assert estimate.optimizer == pytest.approx(state, rel=0.02)


def kept_by_autograd(model, tokens):
    """Bytes that a forward pass keeps for the backward pass, each storage once, parameters left out."""
    parameter_memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_memory:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens)
    return sum(storage.nbytes() for storage in kept.values())


# LayerNorm, because the CPU takes RMSNorm apart; unfused attention; no dropout, whose CPU masks are wider than a GPU's
SMALL = (
    ONE + "--bf16 --normalization LayerNorm --num-layers 3 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 2 --vocab-size 512 --mock-data --tokenizer-type NullTokenizer "
)
UNFUSED = ["--transformer-impl", "local"]  # what a run chooses by itself here
SELECTIVE = "--recompute-granularity selective --recompute-modules "
CASES = {
    "gru": "",
    "gru, fp32 routing": "--moe-router-dtype fp32",
    "gru, recompute": "--moe-router-dtype fp32 --moe-router-impl recompute",
    "gru, projectors and heads shared": "--moe-router-dtype fp32 --moe-router-share-projector 2 "
    "--moe-router-share-head all",
    "linear": "--moe-router-type linear --moe-router-rnn-hidden-size=null",
    "mlp, fp32 routing": "--moe-router-type mlp --moe-router-dtype fp32",
    "random": "--moe-router-type random",
    "hyper, fp32 routing": "--moe-router-type hyper --moe-router-dtype fp32",
    "lstm": "--moe-router-type lstm",
    "xmoe on a state": "--moe-router-head xmoe --moe-router-dtype fp32",
    "scores passed on": "--moe-router-recurrence none --moe-router-residual 0.5",
    "lstm, full": "--moe-router-type lstm --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "two matrices": "--no-swiglu",
    "dense layers": "--moe-layer-freq ([0]+[1]*2) --ffn-hidden-size 512",
    "grouped queries": "--group-query-attention --num-query-groups 2",
    "shared expert": "--moe-shared-expert-intermediate-size 192",
    "core_attn": SELECTIVE + "core_attn",
    "moe": "--moe-router-dtype fp32 " + SELECTIVE + "moe",
    "core_attn moe": SELECTIVE + "core_attn moe",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "full, some layers": "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
}


@pytest.mark.parametrize("case", CASES)
def test_activations(case, tmp_path):
    typed = (SMALL + CASES[case]).split()
    run = checked(TINY, tmp_path, typed, 1)
    settings = read_settings(arguments(TINY, typed + UNFUSED)[0])
    with rank_of(run, 0) as groups:
        (chunk,) = build(run, groups, "cpu")
        model = Float16Module(chunk.config, chunk).train()
        measured = kept_by_autograd(model, torch.randint(512, (2, 128)))
    estimate = memory.on_rank(settings, 1, 0).activations
    assert estimate == pytest.approx(measured, rel=0.03)


def test_two_forms_of_gru_differ_by_what_they_keep(tmp_path):
    """To the byte, in models that are alike but for it: the rest, of which activations are a percent off, cancels."""
    planned, measured = {}, {}
    for impl in ("eager", "recompute"):
        typed = (SMALL + f"--moe-router-dtype fp32 --moe-router-impl {impl}").split()
        run = checked(TINY, tmp_path, typed, 1)
        settings = read_settings(arguments(TINY, typed + UNFUSED)[0])
        planned[impl] = memory.on_rank(settings, 1, 0).routing
        with rank_of(run, 0) as groups:
            (chunk,) = build(run, groups, "cpu")
            measured[impl] = kept_by_autograd(Float16Module(chunk.config, chunk).train(), torch.zeros(2, 128).long())
    size = settings.routing.state_size
    first = 4 * (2 * 128 * size - 3 * size)  # no product with a state in the first layer, and a bias in its place
    assert measured["eager"] - measured["recompute"] == planned["eager"] - planned["recompute"] - first


def test_fp32_activations(tmp_path):
    typed = [word for word in SMALL.split() if word != "--bf16"]
    run = checked(TINY, tmp_path, typed, 1)
    settings = read_settings(arguments(TINY, typed + UNFUSED)[0])
    with rank_of(run, 0) as groups:
        (chunk,) = build(run, groups, "cpu")
        measured = kept_by_autograd(chunk.train(), torch.randint(512, (2, 128)))
    assert memory.on_rank(settings, 1, 0).activations == pytest.approx(measured, rel=0.03)


def settings_of(name, *typed):
    return read_settings(arguments(REPOSITORY / "configs" / f"{name}.yaml", list(typed))[0])


def test_routing_share_is_what_the_twin_does_not_have():
    gru, linear = settings_of("rmoe_0.9b_8xa100"), settings_of("smoe_0.9b_8xa100")
    ours, theirs = memory.fullest(gru, 8), memory.fullest(linear, 8)
    # of the linear twin its own matrix is its routing
    assert ours.total - ours.routing == pytest.approx(theirs.total - theirs.routing, rel=1e-3)
    assert theirs.routing < ours.routing < 0.04 * ours.total


def test_recompute_modes_keep_less_and_less():
    settings = settings_of("rmoe_0.9b_8xa100", "--transformer-impl", "local")
    kept = [memory.fullest(memory.with_recompute(settings, mode), 8).activations for mode in memory.RECOMPUTE_MODES]
    none, core, moe, both, full = kept
    assert none > core > both > full and none > moe > both


def test_stages_hold_fewer_micro_batches_one_after_another():
    settings = replace(settings_of("rmoe_0.9b_4x8xa100"), expert=1, pipeline=4, vocab_size=128)
    ranks = [memory.on_rank(settings, 4, rank).activations for rank in range(4)]
    assert ranks[0] == pytest.approx(4 * ranks[3], rel=0.05) and sorted(ranks, reverse=True) == ranks
    one = replace(settings, global_batch_size=settings.micro_batch_size)  # no second micro-batch to hold
    assert memory.on_rank(one, 4, 0).activations == pytest.approx(ranks[0] / 4)


def test_the_distributed_optimizer_shares_its_state():
    settings = settings_of("rmoe_0.9b_8xa100")
    alone, eight = memory.on_rank(settings, 1, 0), memory.on_rank(settings, 8, 0)
    assert alone.optimizer == 12 * parameters.model(settings).total
    assert eight.optimizer == pytest.approx(alone.optimizer / 8, rel=1e-6)
