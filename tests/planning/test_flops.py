"""The plan's FLOPs are those that torch counts in a model of Megatron's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rmoe_megablocks.planning.counts.flops import flops
from rmoe_megablocks.planning.settings import read_settings
from tests.planning.built import arguments, build, checked, rank_of
from tests.planning.test_memory import ONE, TINY, UNFUSED

SMALL = ONE + (
    "--num-layers 3 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 --vocab-size 512 --mock-data "
    "--tokenizer-type NullTokenizer "
)
P = 64
GRU = 2 * 3 * P**2
# What the plan counts of every layer and the model's first has not: products with a state, forward and backward. An
# LSTM multiplies its zeros.
CASES = {
    "gru": ("", (GRU, 2 * GRU)),
    "gru, recompute": ("--moe-router-impl recompute", (GRU, 3 * GRU)),
    "linear": ("--moe-router-type linear --moe-router-rnn-hidden-size=null", (0, 0)),
    "lstm": ("--moe-router-type lstm", (0, 2 * 4 * P**2)),
    "grouped queries, dense layer, shared expert, two matrices": (
        "--group-query-attention --num-query-groups 2 --moe-layer-freq ([0]+[1]*2) --ffn-hidden-size 512 "
        "--moe-shared-expert-intermediate-size 192 --no-swiglu",
        (GRU, 2 * GRU),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_training(case, tmp_path):
    options, first = CASES[case]
    typed = (SMALL + options).split()
    run = checked(TINY, tmp_path, typed, 1)
    settings = read_settings(arguments(TINY, typed + UNFUSED)[0])
    tokens = torch.randint(512, (2, 128))
    positions = torch.arange(128).expand_as(tokens)
    with rank_of(run, 0) as groups:
        (model,) = build(run, groups, "cpu")
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens, positions, None, labels=tokens).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    planned = flops(settings)
    # Unfused attention computes the whole square, of which the plan counts the causal half.
    assert planned.forward + planned.attention - first[0] == forward.get_total_flops() / tokens.numel()
    both = (forward.get_total_flops() + backward.get_total_flops()) / tokens.numel()
    assert planned.training + 3 * planned.attention - sum(first) == both
