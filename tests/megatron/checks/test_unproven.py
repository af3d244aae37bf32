"""What was never tried with a recurrent router is refused, and nothing else: not what Megatron itself derives."""

import argparse

import pytest

from rmoe_megablocks.megatron.checks import unproven

ARGS = {
    "tensor_model_parallel_size": 2,
    "expert_tensor_parallel_size": None,
    "moe_backend": "megatron",
    "use_mup": False,
    "optimizer": "adam",
}


def refused(**given) -> list[str]:
    return [option for applies, option, _ in unproven.refusals(argparse.Namespace(**(ARGS | given))) if applies]


def test_an_argument_that_this_megatron_does_not_have_counts_as_not_given():
    assert refused() == []


def test_shards_that_validation_derives_from_the_layout_are_not_refused():
    derived = {"tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_num_weight_shards": 2}
    assert refused(**derived) == []
    assert refused(tensor_parallel_num_weight_shards=4) == ["--tensor-parallel-num-weight-shards"]
    assert refused(expert_tensor_parallel_size=1, **derived) == ["--expert-tensor-parallel-num-weight-shards"]


@pytest.mark.parametrize("option", ["--enable-mhc-connections", "--mtp-hsm", "--freeze-all-layers"])
def test_options(option):
    assert refused(**{option[2:].replace("-", "_"): True}) == [option]
