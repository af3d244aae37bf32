"""Command lines of the small model that the distributed tests train, and of the layouts they spread it over."""

import os

from rmoe_megablocks.routing import all_arguments, get_router_type

#: all layouts, options and routes over ten iterations, not only those of every test run over six
ALL_CELLS = os.environ.get("RMOE_TEST_ALL_CELLS") == "1"
ITERATIONS = 10 if ALL_CELLS else 6
SIZES = {
    "--num-layers": 4,
    "--hidden-size": 48,
    "--num-attention-heads": 4,
    "--ffn-hidden-size": 64,
    "--num-experts": 4,
    "--moe-router-topk": 2,
    "--moe-ffn-hidden-size": 32,
    "--moe-router-rnn-hidden-size": 16,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    "--vocab-size": 256,
    "--micro-batch-size": 2,
    "--global-batch-size": 4,
    "--train-iters": 10,
}
# A large balancing loss and initialisation give the router a share of the gradient norm that a fault in it shows.
COMMON = (
    "--moe-router-type gru --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1.0 --moe-z-loss-coeff 0.1 "
    "--init-method-std 0.15 --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --lr 1e-3 "
    "--min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --log-interval 100 --seed 1234 "
    "--hidden-dropout 0 --attention-dropout 0 --num-workers 0"
).split()
# Of all cases: RMOE_TEST_OPTIONS="--moe-router-init fan_in --moe-router-rnn-bias" takes them through every layout
OPTIONS = os.environ.get("RMOE_TEST_OPTIONS", "").split()
BASE = [word for pair in SIZES.items() for word in map(str, pair)] + COMMON + OPTIONS
PP2 = "--pipeline-model-parallel-size 2".split()
PP4 = "--pipeline-model-parallel-size 4".split()
INTERLEAVED = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1".split()
TP2_ETP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2".split()
EP2 = "--expert-model-parallel-size 2".split()
CP2 = "--context-parallel-size 2".split()
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
BF16 = "--bf16 --moe-router-dtype fp32".split()
# Rounding sends a token near a tie to another expert, a step that no tolerance covers: here every expert is taken
BF16_ALL_EXPERTS = [*BF16, "--moe-router-topk", "4"]


def of_type(router: str) -> list[str]:
    """Added to BASE another router: what BASE says to gru is taken back where that means nothing."""
    foreign = [argument.option for argument in all_arguments() if argument not in get_router_type(router).arguments]
    return ["--moe-router-type", router, *(f"{option}=null" for option in foreign if option in BASE)]


LINEAR = of_type("linear")


def selective(*modules: str) -> list[str]:
    return ["--recompute-granularity", "selective", "--recompute-modules", *modules]


MOE_RECOMPUTE = selective("moe")
