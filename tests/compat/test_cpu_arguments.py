"""A GPU's command line in CPU mode."""

import pytest

from rmoe_megablocks.compat.megatron_cpu import ARGUMENTS, supply
from rmoe_megablocks.errors import UsageError

GPU = ["--num-layers", "2", "--bf16"]


def test_what_is_needed_comes_behind_what_was_typed_and_is_told():
    argv, note = supply(GPU)
    assert argv == [*GPU, *ARGUMENTS] and note == "CPU mode adds: " + " ".join(ARGUMENTS)
    assert supply(argv) == (argv, "")  # parsed a second time


def test_what_was_typed_is_not_repeated():
    argv, note = supply(["--transformer-impl=local", "--no-rope-fusion", "--attention-backend", "unfused"])
    assert note == (
        "CPU mode adds: --distributed-backend gloo --no-persist-layer-norm --no-masked-softmax-fusion "
        "--no-gradient-accumulation-fusion"
    )
    assert argv.count("--no-rope-fusion") == 1


def test_a_gpus_ways_to_compute_the_same_give_way():
    argv, note = supply(["--distributed-backend", "nccl", "--attention-backend=flash"])
    assert "--distributed-backend gloo" in note and "--attention-backend unfused" in note
    assert argv.index("gloo") > argv.index("nccl") and argv.index("unfused") > argv.index("--attention-backend=flash")


def test_transformer_engine_by_name_is_refused():
    with pytest.raises(UsageError, match="^--transformer-impl transformer_engine does not work without a GPU: leave"):
        supply(["--transformer-impl", "transformer_engine"])
