"""Numbers that Megatron's parser takes and its code cannot use, each refused with the option's name and value."""

import pytest

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import arguments
from tests.distributed.arguments import BASE

REFUSED = {
    "--seed 0": "--seed 0: must be at least 1",
    "--seed 4294967296": "--seed 4294967296: must be at most 4294967295",
    "--seed 4294967200 --pipeline-model-parallel-size 2": "--seed 4294967200: must be at most 4294967195",
    "--log-interval 0": "--log-interval 0: must be at least 1",
    "--eval-interval 0": "to leave evaluation out use --eval-iters 0",
    "--save-interval 0": "--save-interval 0: must be at least 1; to save nothing use --no-checkpoints",
    "--save-wgrads-interval 0": "--save-wgrads-interval 0: must be at least 1",
    "--train-iters 0": "--train-iters 0: must be at least 1",
    "--train-iters -5": "--train-iters -5: must be at least 1",
    "--pipeline-model-parallel-size 0": "--pipeline-model-parallel-size 0: must be at least 1",
    "--moe-router-topk 0": "--moe-router-topk 0: must be at least 1",
    "--moe-layer-freq 0": "--moe-layer-freq 0: must be at least 1",
    "--check-weight-hash-across-dp-replicas-interval 0": "must be at least 1",
    "--num-layers 1000000000000": "--num-layers 1000000000000: must be at most 10000",
    "--num-workers 1000000000000": "--num-workers 1000000000000: must be at most",
    "--seq-length 1": "--seq-length 1: must be at least 2",
    "--lr nan": "argument --lr: invalid value: 'nan' is not a number",
    "--clip-grad inf": "--clip-grad inf: not a finite number",
    "--clip-grad -1": "--clip-grad -1.0: must not be negative",
    "--eval-iters -1": "--eval-iters -1: must not be negative",
    "--adam-beta2 1": "--adam-beta2 1.0: must be below 1",
    "--hidden-dropout 1.5": "--hidden-dropout 1.5: must be below 1",
    "--rotary-percent 1.5": "--rotary-percent 1.5: must be at most 1",
    "--moe-input-jitter-eps 0": "--moe-input-jitter-eps 0.0: must be above zero; leave it out",
    "--rotary-seq-len-interpolation-factor 0": "--rotary-seq-len-interpolation-factor 0: must be above zero",
}
TOGETHER = {
    "--lr 1e-5": "--lr 1e-05 is below --min-lr 0.0001",
    "--fp16 --bf16": "--fp16 and --bf16 are two precisions: keep one",
    "--lr-decay-style WSD": "--lr-decay-style WSD needs --lr-wsd-decay-iters",
    "--lr-warmup-iters 10": "--lr-warmup-iters 10 must be below --lr-decay-iters or --train-iters (10)",
    "--moe-router-topk 5": "--moe-router-topk 5: there are only 4 experts to choose from",
    "--moe-layer-freq [0]*4": "--moe-layer-freq: no layer has experts",
    "--moe-layer-freq [1,0]": "--moe-layer-freq names 2 layers, --num-layers 4",
    "--moe-layer-freq [2,1,1,1]": "--moe-layer-freq [2, 1, 1, 1]: a layer is 1 (with experts) or 0",
    "--group-query-attention --num-query-groups 3": "--num-query-groups 3 does not divide --num-attention-heads 4",
    "--phase-transition-iterations 3": "--phase-transition-iterations needs --train-samples",
    "--kv-channels 7": "--kv-channels x --rotary-percent are 7",
    "--save-wgrads-interval 2": "--save-wgrads-interval without checkpoints: set --save",
    "--record-memory-history": "--record-memory-history: there is no GPU",
    "--use-sharp": "--use-sharp: there is no GPU",
    "--sharp-enabled-group dp": "--sharp-enabled-group needs --use-sharp",
    "--lazy-mpu-init": "--lazy-mpu-init: this entry sets up the process groups at once",
    "--config-logger-dir x": "--config-logger-dir: Megatron cannot write configurations",
    "--moe-apply-probs-on-input": "--moe-apply-probs-on-input needs --moe-router-topk 1, not 2",
    "--gpu-sniff-test-interval 5": "--gpu-sniff-test-interval: there is no GPU",
}
MISSING = {
    "--lr": "no --lr: the optimizer needs a learning rate",
    "--seq-length": "no --seq-length: name the number of tokens in a sequence",
    "--train-iters": "no --train-iters: name the number of iterations (or --train-samples)",
    "--num-layers": "no --num-layers",
    "--hidden-size": "no --hidden-size",
    "--micro-batch-size": "no --micro-batch-size",
    "--max-position-embeddings": "no --max-position-embeddings",
}
ALLOWED = (
    "--moe-layer-freq [0,1,0,1]",
    "--null-tokenizer-pad-id -1",
    "--moe-expert-capacity-factor -1",
    "--lr 0 --min-lr 0",
    "--hidden-dropout 0",
    "--num-workers 0",
)


def refusal(call, *given) -> str:
    with pytest.raises(UsageError) as caught:
        call(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("words", REFUSED)
def test_a_number_alone(words):
    assert REFUSED[words] in refusal(arguments.parse, [*BASE, *words.split()])


def check(argv: list[str]) -> None:
    args = arguments.parse(argv)
    arguments.fill_defaults(args)
    arguments.validate(args)


@pytest.mark.parametrize("words", TOGETHER)
def test_values_together(words):
    assert TOGETHER[words] in refusal(check, [*BASE, "--eval-interval", "5", *words.split()])


@pytest.mark.parametrize("option", MISSING)
def test_what_is_missing(option):
    at = BASE.index(option)
    assert MISSING[option] in refusal(check, BASE[:at] + BASE[at + 2 :])


@pytest.mark.parametrize("words", ALLOWED)
def test_values_that_mean_something(words):
    check([*BASE, "--eval-interval", "5", *words.split()])
