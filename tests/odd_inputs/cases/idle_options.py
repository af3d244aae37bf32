"""Options that do nothing without another one, each named with it."""

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import TINY, would_start

# options, and what they do nothing without
IDLE = {
    "--num-query-groups 2": "--group-query-attention",
    "--q-lora-rank 4": "--multi-latent-attention",
    "--mtp-loss-scaling-factor 0.5": "--mtp-num-layers",
    "--mtp-detach-heads": "--mtp-num-layers",
    "--qk-clip-alpha 0.3": "--qk-clip",
    "--window-attn-skip-freq 2": "--window-size",
    "--dsa-indexer-topk 3": "--experimental-attention-variant dsa",
    "--linear-key-head-dim 3": "--experimental-attention-variant gated_delta_net",
    "--mup-width-mult 2": "--use-mup",
    "--mrope-section 1 1 2": "--position-embedding-type mrope",
    "--yarn-beta-fast 2": "--position-embedding-type yarn",
    "--rotary-scaling-factor 2": "--position-embedding-type yarn",
    "--relative-attention-num-buckets 3": "--position-embedding-type relative",
    "--position-embedding-type learned_absolute --rotary-percent 0.5": "--position-embedding-type rope",
    "--position-embedding-type none --rotary-base 500": "--position-embedding-type rope",
    "--rope-scaling-factor 4": "--use-rope-scaling",
    "--swiglu=false --activation-func-clamp-value 1": "--swiglu or --quick-geglu",
    "--moe-shared-expert-gate": "--moe-shared-expert-intermediate-size",
    "--moe-shared-expert-overlap": "--moe-shared-expert-intermediate-size",
    "--moe-router-num-groups 4": "--moe-router-group-topk",
    "--moe-router-bias-update-rate 0.1": "--moe-router-enable-expert-bias",
    "--moe-router-quantile-balancing-ema 0.5": "--moe-router-load-balancing-type quantile_balancing",
    "--moe-token-drop-policy position": "--moe-expert-capacity-factor",
    "--moe-flex-dispatcher-backend hybridep": "--moe-token-dispatcher-type flex",
    "--moe-paged-stash-page-size 3": "--moe-paged-stash",
    "--moe-upcycling-granularity 2": "--moe-use-upcycling",
    "--moe-routing-trace-max-training-iters 1": "--moe-routing-trace-path",
    "--fp8-margin 3": "--fp8-format",
    "--num-layers-at-start-in-bf16 2": "--first-last-layers-bf16",
    "--initial-loss-scale 1": "--fp16",
    "--loss-scale 128": "--fp16 or --bf16",
    "--grad-reduce-in-bf16": "--bf16",
    "--recompute-method uniform": "--recompute-granularity full",
    "--recompute-num-layers 1": "--recompute-granularity full",
    "--recompute-modules moe": "--recompute-granularity selective",
    "--activation-offload-fraction 0.3": "--fine-grained-activation-offloading",
    "--optimizer-offload-fraction 0.3": "--optimizer-cpu-offload",
    "--microbatch-group-size-per-virtual-pipeline-stage 3": "--num-virtual-stages-per-pipeline-rank",
    "--wgrad-deferral-limit 3": "--defer-embedding-wgrad-compute",
    "--ddp-bucket-size 3": "--overlap-grad-reduce",
    "--cp-comm-type a2a": "--context-parallel-size",
    "--cross-entropy-fusion-impl te": "--cross-entropy-loss-fusion",
    "--cuda-graph-warmup-steps 2": "--cuda-graph-impl",
    "--sgd-momentum 0.5": "--optimizer sgd",
    "--optimizer sgd": "--optimizer adam",  # tiny.yaml has --adam-beta2
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1": "--weight-decay-incr-style const",
    "--muon-momentum 0.5": "--optimizer muon",
    "--decoupled-min-lr 1e-3": "--decoupled-lr",
    "--lr-wsd-decay-iters 2": "--lr-decay-style WSD",
    "--lr-warmup-init 1e-4 --lr-warmup-fraction=null": "--lr-warmup-fraction",
    "--validation-set-names a b": "--multiple-validation-sets",
    "--tokenizer-model x": "a --tokenizer-type that reads one",
    "--trust-remote-code": "--tokenizer-type HuggingFaceTokenizer",
    "--profile-step-start 5": "--profile",
    "--manual-gc-interval 5": "--manual-gc",
    "--wandb-exp-name x": "--wandb-project",
    "--no-initialization": "--load",
    "--fault-injector-seed 3": "--fault-injector-num-ranks",
}
DENSE = (
    "--num-experts=null --moe-router-type linear --moe-router-init=null --moe-router-rnn-hidden-size=null "
    "--moe-ffn-hidden-size=null"
)

CASES = [
    *(Case(words, f"{TINY} {words}", refused=f" does nothing without {need}") for words, need in IDLE.items()),
    Case(
        "two options that do nothing",
        f"{TINY} --mtp-detach-heads --mtp-loss-scaling-factor 0.5",
        refused="--mtp-detach-heads and --mtp-loss-scaling-factor do nothing without --mtp-num-layers",
    ),
    Case(
        "a model without experts with options of theirs",
        f"{TINY} {DENSE}",
        refused="--moe-aux-loss-coeff and --moe-token-dispatcher-type do nothing without --num-experts",
    ),
    *(
        Case(words, f"{TINY} {words}", works=would_start)
        for words in (
            f"{DENSE} --moe-aux-loss-coeff=null --moe-token-dispatcher-type=null",
            "--num-query-groups 1",  # Megatron's default
            "--group-query-attention --num-query-groups 2",
            "--mtp-num-layers 1 --mtp-loss-scaling-factor 0.5",
            "--position-embedding-type yarn --rotary-scaling-factor 2 --yarn-beta-fast 16",
            "--recompute-activations --recompute-modules core_attn",
            "--moe-expert-capacity-factor 1 --moe-token-drop-policy position",
        )
    ),
]
