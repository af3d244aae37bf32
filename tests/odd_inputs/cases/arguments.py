"""Odd values of Megatron's arguments, arguments that do nothing, and what the router does not work with."""

from tests.odd_inputs.case import Case

TINY = "pretrain --config {repository}/configs/tiny.yaml"

# options and the line that refuses them
REFUSED = {
    "--seed 0": "--seed 0: must be at least 1",
    "--log-interval 0": "--log-interval 0: must be at least 1",
    "--eval-interval 0": "--eval-interval 0: must be at least 1; to leave evaluation out use --eval-iters 0",
    "--train-iters 0": "--train-iters 0: must be at least 1",
    "--train-iters=null": "no --train-iters: name the number of iterations",
    "--save-interval 0": "--save-interval 0: must be at least 1; to save nothing use --no-checkpoints",
    "--lr=null": "no --lr: the optimizer needs a learning rate",
    "--lr 1e-5": r"--lr 1e-05 is below --min-lr 0\.0002",
    "--lr nan": "--lr",
    "--lr -1": "--lr -1.0: must not be negative",
    "--lr-decay-style WSD": "--lr-decay-style WSD needs --lr-wsd-decay-iters",
    "--lr-warmup-init 1": "--lr-warmup-init <= --lr, but was given --lr-warmup-init 1.0, --lr 0.002",
    "--lr-warmup-fraction 1": "--lr-warmup-fraction 1.0: must be below 1",
    "--clip-grad -1": "--clip-grad -1.0: must not be negative",
    "--adam-beta2 1": "--adam-beta2 1.0: must be below 1",
    "--hidden-dropout 1.5": "--hidden-dropout 1.5: must be below 1",
    "--fp16 --bf16": "--fp16 and --bf16 are two precisions: keep one",
    "--seq-length=null": "no --seq-length: name the number of tokens in a sequence",
    "--seq-length 512": r"max_position_embeddings \(256\) must be greater than or equal to seq_length",
    "--hidden-size 130": "--hidden-size % --num-attention-heads == 0 with no --kv-channels, but was given",
    "--kv-channels 31": "turns pairs of channels, and --kv-channels x --rotary-percent are 31",
    "--num-layers 1000000000": "--num-layers 1000000000: must be at most",
    "--num-layers 3": "Number of layers should be divisible.*--num-layers 3",
    "--micro-batch-size 0": "--micro-batch-size 0: must be at least 1",
    "--global-batch-size 15": r"eval_global_batch_size \(15\) must be divisible.*--eval-global-batch-size 15",
    "--pipeline-model-parallel-size 0": "--pipeline-model-parallel-size 0: must be at least 1",
    "--group-query-attention --num-query-groups 3": "--num-query-groups 3 does not divide --num-attention-heads 4",
    "--moe-router-topk 9": "--moe-router-topk 9: there are only 8 experts to choose from",
    "--moe-router-topk 0": "--moe-router-topk 0: must be at least 1",
    "--moe-layer-freq 0": "--moe-layer-freq 0: must be at least 1",
    "--moe-layer-freq [1,0]": "--moe-layer-freq names 2 layers, --num-layers 4",
    "--moe-layer-freq [0]*4": "--moe-layer-freq: no layer has experts",
    "--weight-decay-incr-style linear": "requires --start-weight-decay.*no --start-weight-decay",
    "--wandb-project x": "--wandb-project x: the package wandb is not installed",
    "--optimizer muon": "--moe-router-type gru does not work with --optimizer muon: use adam or sgd",
    "--enable-ft-package": "--enable-ft-package: the package nvidia_resiliency_ext is not installed",
    "--num-distributed-optimizer-instances 2": "--num-distributed-optimizer-instances 2 does not divide",
    "--overlap-param-gather": "--overlap-param-gather only supported with distributed optimizer",
    "--train-samples 100": "expected iteration-based training.*--train-samples 100",
    "--checkpoint-activations": "--checkpoint-activations is no longer valid, use --recompute-activations",
    "--rampup-batch-size 4 4 100": "--rampup-batch-size would do nothing.*use --step-batch-size-schedule",
    "--use-flash-attn": "--use-flash-attn would do nothing.*use --attention-backend flash",
    "--openai-gelu": "--openai-gelu would do nothing",
    "--rl-profile": "--rl-profile belongs to reinforcement learning",
    "--inference-max-requests 8": "--inference-max-requests belongs to inference",
    "--mlp-chunks-for-training 2": "gru does not work with --mlp-chunks-for-training: it calls the router",
    "--mlp-chunks-for-prefill 2": "gru does not work with --mlp-chunks-for-prefill: it calls the router",
    "--enable-cuda-graph": "gru does not work with --cuda-graph-impl",
    "--mtp-num-layers 2 --mtp-use-repeated-layer": "gru does not work with --mtp-use-repeated-layer",
    "--use-mup": "gru does not work with --use-mup",
    "--global-batch-size=null --step-batch-size-schedule '0:16 1K:9'": "9 is no multiple of 4",
    "--global-batch-size=null --step-batch-size-schedule x": "--step-batch-size-schedule .x.: Invalid schedule entry",
}


def would_start(outcome):
    assert "would start" in outcome.out, outcome.out + outcome.err


CASES = [
    *(Case(words, f"{TINY} {words}", refused=line) for words, line in REFUSED.items()),
    *(
        Case(words, f"{TINY} {words}", works=would_start)
        for words in (
            "--moe-layer-freq [0,1,0,1]",
            "--global-batch-size=null --step-batch-size-schedule '0:16 100K:32'",
            "--lr-decay-style WSD --lr-wsd-decay-iters 10",
            "--use-mcore-models",
            "--moe-router-type linear --mlp-chunks-for-training 2",
        )
    ),
]
