"""Parameter counts of layouts and model kinds that no configuration has, against what Megatron builds."""

import pytest

from rmoe_megablocks.launcher.config import REPOSITORY
from rmoe_megablocks.planning import read_settings
from rmoe_megablocks.planning.counts import parameters
from tests.planning.built import arguments, build, checked, count, rank_of, stage_ranks

TINY = REPOSITORY / "configs" / "tiny.yaml"
PP2 = "--pipeline-model-parallel-size 2 "
CASES = {
    "one process": "--pipeline-model-parallel-size 1",
    "tensor": PP2 + "--tensor-model-parallel-size 2 --sequence-parallel",
    "tensor, whole experts": PP2
    + "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    + "--expert-model-parallel-size 2",
    "experts": PP2 + "--expert-model-parallel-size 4",
    "interleaved": PP2 + "--num-layers 8 --num-layers-per-virtual-pipeline-stage 2",
    "dense layers": PP2 + "--num-layers 6 --moe-layer-freq ([0]*2+[1,0]*2) --ffn-hidden-size 96",
    "tied": PP2 + "--no-untie-embeddings-and-output-weights",
    "tied, one process": "--no-untie-embeddings-and-output-weights --pipeline-model-parallel-size 1",
    "layer norm": PP2 + "--normalization LayerNorm",
    "biases": PP2 + "--no-disable-bias-linear --moe-router-type linear",
    "biases of the recurrent router": PP2 + "--moe-router-rnn-bias",
    "projectors and heads that layers share": PP2 + "--moe-router-rnn-bias --moe-router-share-projector 3 "
    "--moe-router-share-head all",
    "biases over tensor and experts": PP2
    + "--no-disable-bias-linear --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    + "--expert-model-parallel-size 2 --moe-layer-freq 2 --moe-router-type linear",
    "an lstm": PP2 + "--moe-router-type lstm",
    "xmoe on a state": PP2 + "--moe-router-head xmoe",
    "frozen networks": PP2 + "--moe-router-type hyper",
    "one matrix for all": PP2 + "--moe-router-type omni",
    "null experts": PP2 + "--moe-null-experts 3",
    "null experts, biases": PP2 + "--no-disable-bias-linear --moe-router-type linear --moe-null-experts 3",
    "qkv bias": PP2 + "--add-qkv-bias",
    "two matrices": PP2 + "--no-swiglu",
    "grouped queries": PP2 + "--group-query-attention --num-query-groups 2 --kv-channels 16",
    "qk norm": PP2 + "--qk-layernorm",
    "learned positions": PP2 + "--position-embedding-type learned_absolute",
    "shared expert": PP2 + "--moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate",
    "padded vocabulary": PP2 + "--vocab-size 1000 --make-vocab-size-divisible-by 96",
    "no experts": "--num-experts=null --moe-router-type linear --moe-router-init=null --moe-ffn-hidden-size=null "
    "--moe-router-rnn-hidden-size=null --moe-aux-loss-coeff=null --moe-token-dispatcher-type=null",
}


@pytest.mark.parametrize("case", CASES)
def test_counts_of_every_stage_are_exact(case, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # tensor parallelism insists
    typed = CASES[case].split()
    run = checked(TINY, tmp_path, [*typed, "--global-batch-size", "32"], world_size=8)
    settings = read_settings(arguments(TINY, [*typed, "--global-batch-size", "32"])[0])
    built = []
    for stage, rank in enumerate(stage_ranks(run)):
        with rank_of(run, rank) as groups:
            built.append(count(build(run, groups)))
        counts = parameters.stage(settings, stage)
        assert counts.dense_on_rank(settings) + counts.experts_on_rank(settings) == built[-1]
    whole = parameters.model(settings)
    copies = (settings.pipeline - 1) * parameters.recurrence(settings).total
    if settings.tied and settings.pipeline > 1:
        copies += settings.vocab_size * settings.hidden_size
    assert sum(parameters.stage(settings, i).total for i in range(settings.pipeline)) == whole.total + copies
