"""The models that are converted: a few in every test run, all router types with RMOE_TEST_ALL_CELLS=1."""

import os

from rmoe_megablocks.routing import get_router_type
from rmoe_megablocks.routing.registry import router_types

ALL_CELLS = os.environ.get("RMOE_TEST_ALL_CELLS") == "1"
SMALL = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 40 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 48 --seq-length 16 --max-position-embeddings 16 --vocab-size 256 --micro-batch-size 2 "
    "--global-batch-size 2 --train-iters 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
    "--moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --eval-iters 0 --eval-interval 100 "
    "--hidden-dropout 0 --attention-dropout 0 --num-workers 0 --seed 1234"
).split()
UNTIED = ["--untie-embeddings-and-output-weights"]
GRU = ["--moe-router-type", "gru", "--moe-router-rnn-hidden-size", "8"]
MEGABLOCKS = ["--moe-backend", "megablocks"]
DENSE_FIRST = ["--moe-layer-freq", "[0,1,1]"]
SHARED = ["--moe-shared-expert-intermediate-size", "24"]
GROUPED = ["--group-query-attention", "--num-query-groups", "2", "--kv-channels", "12"]

#: what a cell is there for, in its name
CELLS: dict[str, list[str]] = {
    "stacked, untied, gru": [*UNTIED, *GRU],
    "dense first, grouped queries, shared expert, tied, norms and biases of q and k, shared projector": [
        *(*DENSE_FIRST, *GROUPED, *SHARED, *GRU, "--qk-layernorm", "--add-qkv-bias", "--moe-router-rnn-bias"),
        *("--moe-router-share-projector", "2"),
    ],
    "linear, null experts, gated shared expert, padded vocabulary, MegaBlocks": [
        *(*UNTIED, *SHARED, "--moe-shared-expert-gate", "--moe-null-experts", "2", *MEGABLOCKS),
        *("--make-vocab-size-divisible-by", "96"),
    ],
    "bf16, expert bias in fp32, sigmoid": [
        *(*UNTIED, "--bf16", "--moe-router-dtype", "fp32", "--moe-router-score-function", "sigmoid"),
        *("--moe-router-enable-expert-bias", "--moe-router-topk-scaling-factor", "2.5"),
    ],
}
#: of them the two that have most in them, where a test takes long
FEW = list(CELLS)[1::2]
if ALL_CELLS:
    for _name in router_types():
        if get_router_type(_name).layer is None or get_router_type(_name).layer.__module__.startswith(
            "rmoe_megablocks."
        ):
            _state = ["--moe-router-rnn-hidden-size", "8"]
            _takes = {argument.option for argument in get_router_type(_name).arguments}
            _own = ["--moe-router-type", _name, *(_state if _state[0] in _takes else [])]
            for _precision in ([], ["--bf16"]):
                for _backend in ([], MEGABLOCKS):
                    _cell = [_name, *_precision, *_backend[1:]]
                    CELLS[" ".join(_cell)] = [*UNTIED, *_own, *_precision, *_backend]
            CELLS[f"{_name} behind a dense layer"] = [*DENSE_FIRST, *_own]
    for _head in ("cosine", "xmoe", "product_key"):
        CELLS[f"gru read by {_head}"] = [*UNTIED, *GRU, "--moe-router-head", _head, "--moe-router-share-head", "all"]
    CELLS["gru with a residual"] = [*UNTIED, *GRU, "--moe-router-residual", "0.5"]
    FEW = list(CELLS)
