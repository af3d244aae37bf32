"""Odd options and sizes for ``rmoe plan``."""

import json

from tests.odd_inputs.case import Case

PAPER = "rmoe plan {repository}/configs/rmoe_0.9b_8xa100.yaml"


def refused(options: str, line: str) -> Case:
    return Case(f"rmoe plan {options}", f"{PAPER} {options}", refused=line)


def warned(line: str | None):
    def check(outcome):
        found = json.loads(outcome.out)
        assert [line] * (line is not None) == found["warnings"], found["warnings"]
        assert found["parameters"]["total"] == 1_069_103_104

    return check


CASES = [
    refused("--nmu-layers 3", "--nmu-layers 3 .did you mean --num-layers"),
    refused("--moe-router-type rnnn", "--moe-router-type: unknown router type 'rnnn', did you mean rnn"),
    refused("--moe-router-topk 17", "--moe-router-topk 17 is more than --num-experts 16"),
    refused("--moe-null-experts 2 --moe-router-topk 19", "19 is more than --num-experts 16 and --moe-null-experts 2"),
    refused("--num-experts=null", "--moe-router-type gru: the model has no experts"),
    refused("--hidden-size 1282", "--hidden-size 1282 is not a multiple of --num-attention-heads 20"),
    refused("--group-query-attention --num-query-groups 3", "20 is not a multiple of --num-query-groups 3"),
    refused("--pipeline-model-parallel-size 5 --world-size 10", "--num-layers over .*24 is not a multiple of 5"),
    refused("--expert-model-parallel-size 3 --world-size 6 --global-batch-size 12", "experts over .*16"),
    refused("--tensor-model-parallel-size 8 --sequence-parallel", "--num-attention-heads over .*20"),
    refused("--micro-batch-size 3", "--global-batch-size over .*1120 is not a multiple of 24"),
    refused("--world-size 6", "--global-batch-size over .*1120"),
    refused("--moe-layer-freq [1]*3", "--moe-layer-freq: .*list of 24"),
    refused("--mtp-num-layers 1", "cannot compute with --mtp-num-layers"),
    refused("--softmax-type learnable", "cannot compute with --softmax-type"),
    refused("--lr abc", "--lr: invalid value: 'abc'"),
    Case("rmoe plan with an option it does not look at", f"{PAPER} --json --fp32-residual-connection",
         works=warned("not looked at, figures are those without: --fp32-residual-connection")),
    Case("rmoe plan with options that move no figure", f"{PAPER} --json --seed 7 --lr 1e-3", works=warned(None)),
]  # fmt: skip
