"""Values and pairs that Megatron takes, and then computes something else for, or stops at later."""

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import ONE, TINY, would_start

TYPE = "--moe-router-load-balancing-type"
SINKHORN = f"{TYPE} sinkhorn --moe-aux-loss-coeff 0"
QUANTILES = f"{TYPE} quantile_balancing --moe-aux-loss-coeff 0"

REFUSED = {
    # a window's right end shows the token that is to be predicted
    "--window-size 4,3": r"--window-size 4,3: two numbers are wanted, LEFT,0.*none after it",
    "--window-size 4,-1": "--window-size 4,-1: two numbers are wanted",
    "--window-size=-5,0": "--window-size -5,0: two numbers are wanted",
    "--window-size 4": "--window-size 4: two numbers are wanted",
    "--activation-func-clamp-value 1": "1.0: the fused SwiGLU does not clamp; add --no-bias-swiglu-fusion",
    "--rotary-percent 0.01": "--rotary-percent 0.01 leaves no channel to turn",
    "--no-rope-freq [1,2,0,0]": "--no-rope-freq .*a layer is 1 .without rotary positions. or 0",
    "--position-embedding-type mrope --mrope-section 4 6 6": "mrope: the positions of this entry's data",
    "--use-rope-scaling --rope-scaling-factor 0": "--rope-scaling-factor 0.0: must be above zero",
    # routing
    f"{TYPE} aux_loss quantile_balancing --moe-aux-loss-coeff 0.01 0": "quantile_balancing is no loss that goes with",
    f"{TYPE} sinkhorn sinkhorn --moe-aux-loss-coeff 0 0": "sinkhorn is no loss that goes with others",
    f"{TYPE} aux_loss none --moe-aux-loss-coeff 0.01 0.02": "none is no loss that goes with others",
    f"{TYPE} aux_loss aux_loss --moe-aux-loss-coeff 0.01 0.02": "names a type twice",
    f"{TYPE} aux_loss --moe-aux-loss-coeff 0.01 0.01": "--moe-aux-loss-coeff names 2 weights, .* 1 types",
    f"{TYPE} aux_loss seq_aux_loss": "--moe-aux-loss-coeff names 1 weights, .* 2 types",
    "--moe-aux-loss-coeff=-0.01": "--moe-aux-loss-coeff -0.01: must not be negative",
    f"{TYPE} quantile_balancing": "quantile_balancing with an auxiliary loss does not work: set --moe-aux-loss-coeff 0",
    f"{QUANTILES} --moe-router-quantile-balancing-ema 1": "--moe-router-quantile-balancing-ema 1.0: must be below 1",
    f"{QUANTILES} --moe-router-num-groups 4 --moe-router-group-topk 2": "does not look at --moe-router-group-topk",
    f"{SINKHORN} --moe-router-num-groups 4 --moe-router-group-topk 2": "does not look at --moe-router-group-topk",
    f"{SINKHORN} --moe-router-score-function sigmoid": "sinkhorn does not look at --moe-router-score-function",
    f"{SINKHORN} --moe-router-pre-softmax": "sinkhorn does not look at --moe-router-pre-softmax",
    f"{SINKHORN} --moe-router-topk-scaling-factor 2": "sinkhorn does not look at --moe-router-topk-scaling-factor",
    f"{SINKHORN} --moe-router-enable-expert-bias --moe-router-score-function sigmoid": "sinkhorn does not look at",
    "--moe-router-num-groups 8 --moe-router-group-topk 1": r"--moe-router-topk 2: 1 of the 8 groups .* have 1 of the 8",
    "--moe-router-num-groups 4 --moe-router-group-topk 3": "--moe-router-group-topk 3 is more than --moe-router-topk 2",
    "--moe-router-topk-scaling-factor 0": "--moe-router-topk-scaling-factor 0.0: must be above zero",
    "--moe-expert-capacity-factor 0": "--moe-expert-capacity-factor 0.0: every token would be dropped",
    "--moe-input-jitter-eps 2": "--moe-input-jitter-eps 2.0: must be below 1",
    "--moe-enable-routing-replay": "--moe-enable-routing-replay: nothing in this entry records routing",
    # optimizer, schedules, precision
    "--adam-eps 0": "--adam-eps 0.0: must be above zero",
    "--init-method-std 0": "--init-method-std 0.0: must be above zero; a model of zeros cannot train",
    "--init-method-xavier-uniform": "--init-method-xavier-uniform: Megatron-Core 0.19 makes no configuration",
    "--decoupled-lr 1e-5": "--decoupled-lr 1e-05 is below --min-lr 0.0002",
    "--decoupled-lr 1e-3 --decoupled-min-lr 1e-2": "--decoupled-lr 0.001 is below --decoupled-min-lr 0.01",
    "--lr-decay-style WSD --lr-wsd-decay-iters 1000": "--lr-wsd-decay-iters 1000: .*longer than the run",
    "--train-iters=null --train-samples 3": "--train-samples 3: not one batch of --global-batch-size 16",
    "--train-iters=null --train-samples 64 --lr-warmup-fraction=null --lr-warmup-samples 64": "--lr-warmup-samples 64",
    "--bf16 --fp32-residual-connection": "--fp32-residual-connection needs Transformer Engine",
    "--apply-layernorm-1p": "--apply-layernorm-1p needs",
    "--fp16 --initial-loss-scale 1 --min-loss-scale 10": "--min-loss-scale 10.0 is above --initial-loss-scale 1.0",
    "--fp16 --loss-scale 0": "--loss-scale 0.0: must be above zero; leave it out for a dynamic one",
    "--fp16 --loss-scale-window 0": "--loss-scale-window 0.0: must be above zero",
    "--fp16 --hysteresis 0": "--hysteresis 0: must be at least 1",
    # the run
    "--exit-interval 0": "--exit-interval 0: must be at least 1; leave it out to train to the end",
    "--exit-duration-in-mins 0": "--exit-duration-in-mins 0: must be at least 1",
    "--distributed-timeout-seconds-after-init 0": "--distributed-timeout-seconds-after-init 0: must be at least 1",
    "--rerun-mode report_stats": "--rerun-mode report_stats: .*use validate_results",
    "--log-energy": "--log-energy: there is no GPU",
    "--profile": "--profile: there is no GPU for Nsight Systems; add --use-pytorch-profiler",
    "--profile --use-pytorch-profiler --profile-step-start 9 --profile-step-end 3": "--profile-step-start 9 must be",
    "--context-parallel-size 2 --cp-comm-type nonsense": "--cp-comm-type nonsense: choose from",
    f"{ONE} --decoder-first-pipeline-num-layers 1": "--decoder-first-pipeline-num-layers 1: the one pipeline stage",
    "--decoder-last-pipeline-num-layers 9": "--decoder-last-pipeline-num-layers",
    "--vocab-size 10": "training's vocabulary has only 10 .--vocab-size",
    "--per-split-data-args-path nowhere": "--per-split-data-args-path nowhere: cannot be read .No such file",
}

CASES = [
    *(Case(words, f"{TINY} {words}", refused=line) for words, line in REFUSED.items()),
    *(
        Case(words, f"{TINY} {words}", works=would_start)
        for words in (
            "--window-size 4,0",
            "--activation-func-clamp-value 1 --no-bias-swiglu-fusion",
            "--moe-router-num-groups 4 --moe-router-group-topk 2",
            f"{TYPE} aux_loss seq_aux_loss --moe-aux-loss-coeff 0.01 0.02",
            QUANTILES,
            "--decoupled-lr 1e-3 --decoupled-min-lr 1e-4",
            "--train-iters=null --train-samples 64",
            "--fp16 --initial-loss-scale 1024 --hysteresis 1",
        )
    ),
]
