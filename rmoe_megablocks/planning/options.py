"""Which of Megatron's options a plan computes with, which leave its figures alone, and which it refuses.

An option that is in none of the lists is named beside the figures: they are those without it.
"""

from __future__ import annotations

import argparse

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import all_arguments

RECOMPUTE_MODULES = ("core_attn", "moe", "moe_act", "layernorm", "mlp", "shared_experts")

#: What a plan computes with; settings.py reads them.
COUNTED = """
    --num-layers --hidden-size --num-attention-heads --kv-channels --group-query-attention --num-query-groups
    --ffn-hidden-size --swiglu --disable-bias-linear --add-qkv-bias --normalization --qk-layernorm
    --position-embedding-type --max-position-embeddings --vocab-size --padded-vocab-size --make-vocab-size-divisible-by
    --untie-embeddings-and-output-weights --hidden-dropout --attention-dropout --seq-length --micro-batch-size
    --global-batch-size --num-experts --moe-ffn-hidden-size --moe-layer-freq --moe-router-topk --moe-router-dtype
    --moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-router-type
    --moe-null-experts --moe-router-impl --bf16 --fp16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32
    --use-distributed-optimizer --tensor-model-parallel-size --sequence-parallel --pipeline-model-parallel-size
    --num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank --context-parallel-size
    --expert-model-parallel-size --expert-tensor-parallel-size --recompute-granularity --recompute-activations
    --recompute-modules --recompute-method --recompute-num-layers --transformer-impl --attention-backend
""".split()

#: What changes a model, its batches or its optimizer in ways that are not computed here: figures would be wrong.
REFUSED = """
    --multi-latent-attention --mtp-num-layers --hybrid-layer-pattern --hybrid-override-pattern --is-hybrid-model
    --heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json --experimental-attention-variant
    --linear-attention-freq --attention-output-gate --softmax-type --moe-latent-size --moe-use-upcycling
    --moe-single-grouped-bias --encoder-num-layers --decoder-num-layers --encoder-seq-length --decoder-seq-length
    --model-parallel-size --quick-geglu --glu-linear-offset --pipeline-model-parallel-layout
    --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split --tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards
    --num-distributed-optimizer-instances --use-megatron-fsdp --use-torch-fsdp2 --use-precision-aware-optimizer
    --optimizer-cpu-offload --optimizer --freeze-all-layers --fp8-format --fp4-format --spec --yaml-cfg
    --use-checkpoint-args --use-mp-args-from-checkpoint-args --disable-pad-vocab-size --vocab-extra-ids
    --rampup-batch-size --step-batch-size-schedule --batch-size --hierarchical-context-parallel-sizes
    --hybrid-context-parallel --logits-load-dir --logits-save-dir --sft --perform-rl-step
""".split()

#: Megatron's groups of options that move no figure, but for the options above.
_NEUTRAL_GROUPS = {
    "learning rate and weight decay",
    "regularization",
    "profiling",
    "RNG and initialization",
    "checkpointing",
    "validation",
    "data and dataloader",
    "tokenizer",
    "autoresume",
    "logging",
    "one logger",
    "straggler",
    "workload inspector",
    "In-process restart",
    "ft_package",
    "rerun engine",
    "msc",
    "fault injector",
    "run",
}
#: And options of other groups that move none, or none that is told.
_NEUTRAL = """
    --init-method-std --embedding-init-method-std --norm-epsilon --rotary-base --rotary-percent --rotary-interleaved
    --rope-scaling-factor --use-rope-scaling --use-rotary-position-embeddings --rope-type --moe-aux-loss-coeff
    --moe-aux-loss-reduction --moe-z-loss-coeff --moe-router-load-balancing-type --moe-router-score-function
    --moe-router-pre-softmax
    --moe-router-num-groups --moe-router-group-topk --moe-router-topk-scaling-factor --moe-router-enable-expert-bias
    --moe-router-bias-update-rate --moe-router-force-load-balancing --moe-router-force-biased --moe-input-jitter-eps
    --moe-per-layer-logging --moe-grouped-gemm --moe-router-upcycle
    --calculate-per-token-loss
    --train-iters --train-samples --exit-interval --exit-duration-in-mins --exit-signal --exit-signal-handler
    --exit-signal-handler-for-dataloader --exit-signal-handler-for-training --manual-gc --manual-gc-interval
    --disable-manual-gc-eval --dataloader-type --no-check-for-nan-in-loss-and-grad --check-for-large-grads
    --moe-token-dispatcher-type --distributed-backend --distributed-timeout-minutes --overlap-grad-reduce
    --overlap-param-gather
    --overlap-param-gather-with-optimizer-step --no-overlap-p2p-communication --ddp-bucket-size --ddp-num-buckets
    --ddp-average-in-collective --deterministic-mode --config-logger-dir --attention-softmax-in-fp32 --loss-scale
    --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis --use-mcore-models --openai-gelu
    --squared-relu --use-flash-attn --apply-layernorm-1p --use-cpu-initialization
""".split()


def dest(option: str) -> str:
    """The name of a valued option's result."""
    return option.removeprefix("--").replace("-", "_")


def refuse(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UsageError for a given option of REFUSED, unless its value is Megatron's default."""
    refused = {action.dest for option, action in _actions(parser).items() if option in REFUSED}
    for option in sorted(args.explicit):
        action = _actions(parser)[option]
        if action.dest in refused and getattr(args, action.dest) != action.default:
            raise UsageError(f"rmoe plan cannot compute with {option}; leave it out")
    if args.transformer_impl not in ("local", "transformer_engine"):
        raise UsageError(f"rmoe plan cannot compute with --transformer-impl {args.transformer_impl}")


def not_counted(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """The given options that might move a figure and do not."""
    known = {action.dest for option, action in _actions(parser).items() if option in COUNTED or option in _NEUTRAL}
    for group in parser._action_groups:
        if group.title in _NEUTRAL_GROUPS:
            known |= {action.dest for action in group._group_actions}
    known |= {argument.dest for argument in all_arguments()}  # the router is measured with them
    given = {option: _actions(parser)[option] for option in args.explicit}
    moved = {
        option
        for option, action in given.items()
        if action.dest not in known and getattr(args, action.dest) != action.default
    }
    dispatcher = args.moe_token_dispatcher_type
    if args.num_experts and args.expert_model_parallel_size > 1 and dispatcher != "alltoall":
        moved.add(f"--moe-token-dispatcher-type {dispatcher}")  # Megatron's default is allgather
    return tuple(sorted(moved))


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions  # argparse has no other way to ask
