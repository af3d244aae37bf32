"""Every configuration, with its real sizes: accepted by Megatron, built on the meta device, counted, paired."""

import pytest
import torch
import yaml

from rmoe_megablocks.launcher.config import REPOSITORY, load_config
from rmoe_megablocks.planning import make_plan, read_settings
from rmoe_megablocks.planning.counts import memory, parameters
from tests.planning.built import CONFIGS, arguments, build, checked, count, rank_of, stage_ranks

from megatron.core.transformer.module import Float16Module  # isort: skip  after CPU mode

NAMES = [path.stem for path in CONFIGS]
TWINS = [name for name in NAMES if name.startswith("rmoe_")]


def by_name(name):
    return REPOSITORY / "configs" / f"{name}.yaml"


def settings_of(name, typed=()):
    argv, world_size = arguments(by_name(name), typed)
    return read_settings(argv), world_size or 2


@pytest.mark.parametrize("name", NAMES)
def test_megatron_builds_it_and_the_plan_counts_it(name, tmp_path):
    run = checked(by_name(name), tmp_path)  # Megatron's and our validation of arguments and layout
    settings, world_size = settings_of(name)
    assert run.args.world_size == world_size
    for stage, rank in enumerate(stage_ranks(run)):
        with rank_of(run, rank) as groups:
            built = count(build(run, groups))
        counts = parameters.stage(settings, stage)
        assert counts.dense_on_rank(settings) + counts.experts_on_rank(settings) == built


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_finds_no_fault_in_it(name):
    settings, world_size = settings_of(name)
    gpu_memory = float(load_config(by_name(name)).env.get("RMOE_GPU_MEMORY", 80))
    plan = make_plan(settings, world_size, gpu_memory)
    assert plan.warnings == [] and plan.fits


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_without_transformer_engine(name):
    settings, world_size = settings_of(name, ["--transformer-impl", "local"])
    gpu_memory = float(load_config(by_name(name)).env.get("RMOE_GPU_MEMORY", 80))
    assert memory.fullest(settings, world_size).total <= memory.usable(gpu_memory)


@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_the_router_alone(name):
    pair = [load_config(by_name(twin)) for twin in (name, "s" + name[1:])]
    assert pair[0].env == pair[1].env
    differing = {key for key, _ in pair[0].arguments.items() ^ pair[1].arguments.items()}
    own_checkpoint = {"--pretrained-checkpoint"} if name == "rmoe_0.9b_alpaca" else set()
    assert {key for key in differing if not key.startswith("--moe-router-")} == own_checkpoint
    shared = [[source.name for source in config.sources if source.parent.name == "base"] for config in pair]
    assert shared[0] == shared[1] != []


def test_the_paper_pair(tmp_path, capsys):
    built = {}
    for name in ("rmoe_0.9b_8xa100", "smoe_0.9b_8xa100"):
        run = checked(by_name(name), tmp_path)
        with rank_of(run, 0) as groups:
            built[name] = count(build(run, groups))
        assert parameters.model(settings_of(name)[0]).total == built[name]
    hidden, experts, state, layers = 1280, 16, 128, 24
    gru = 6 * state**2 + 6 * state
    difference = layers * (hidden * state + experts * state - experts * hidden) + gru
    assert built["rmoe_0.9b_8xa100"] - built["smoe_0.9b_8xa100"] == difference
    with capsys.disabled():
        print("\n" + ", ".join(f"{name}: {value:,} parameters" for name, value in built.items()))


def test_the_paper_settings():
    arguments = load_config(by_name("rmoe_0.9b_8xa100")).arguments
    expected = """
      {--num-layers: 24, --hidden-size: 1280, --num-attention-heads: 20, --num-experts: 16, --moe-router-topk: 4,
       --moe-ffn-hidden-size: 448, --moe-router-rnn-hidden-size: 128, --vocab-size: 96512, --padded-vocab-size: 96512,
       --seq-length: 4096, --max-position-embeddings: 4096, --global-batch-size: 1120, --lr: 4.2e-4, --min-lr: 4.2e-5,
       --lr-decay-style: cosine, --lr-warmup-iters: 2000, --adam-beta1: 0.9, --adam-beta2: 0.95, --weight-decay: 0.1,
       --clip-grad: 1.0, --init-method-std: 0.02, --bf16: true, --moe-aux-loss-coeff: 0.01, --hidden-dropout: 0,
       --attention-dropout: 0, --swiglu: true, --normalization: RMSNorm, --position-embedding-type: rope}"""
    expected = yaml.safe_load(expected)
    assert {key: arguments[key] for key in expected} == expected


SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 16 --moe-ffn-hidden-size 16 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 2 --vocab-size 128 "
    "--padded-vocab-size 128 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1"
).split()


@pytest.mark.parametrize(
    "name",
    ["rmoe_0.9b_8xa100_40g", "smoe_0.9b_4x8xa100", "rmoe_0.9b_alpaca", "smoe_enwik8_small", "rmoe_enwik8_medium"],
)
def test_its_operations_run_forward_and_backward(name, tmp_path):
    """Not every combination that Megatron's checks accept can be trained: experts with biases cannot."""
    run = checked(by_name(name), tmp_path, SMALL, world_size=1)
    with rank_of(run, 0) as groups:
        (chunk,) = build(run, groups, "cpu")
        model = Float16Module(chunk.config, chunk).train()
        tokens = torch.randint(128, (2, 16))
        loss = model(tokens, torch.arange(16).expand_as(tokens), None, labels=tokens).mean()
        loss.backward()
    assert loss.isfinite()
    gradients = [parameter.grad is not None for name, parameter in chunk.named_parameters() if "router" in name]
    assert gradients and all(gradients)


def test_the_depth_study_is_the_small_model_at_other_depths():
    for router in ("rmoe", "smoe"):
        small = load_config(by_name(f"{router}_enwik8_small")).arguments
        for layers in (6, 12, 18, 24, 32):
            deep = load_config(by_name(f"{router}_enwik8_depth_{layers:02}")).arguments
            assert deep == {**small, "--num-layers": layers}


def test_every_base_is_used():
    used = {source.name for path in CONFIGS for source in load_config(path).sources}
    assert {path.name for path in (REPOSITORY / "configs" / "base").glob("*.yaml")} <= used
