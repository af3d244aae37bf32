"""Options of Megatron that a recurrent router was never tried with, those of releases after 0.19 among them.

Refused by name until somebody has proven them: what they do to the routing state would show as a slightly worse model
at most. An argument that this Megatron does not have counts as not given.
"""

import argparse
from collections.abc import Iterator
from typing import Any


def refusals(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    """(whether it applies, the option, what to use instead)."""
    yield (
        _number(args, "tensor_parallel_num_weight_shards") > 1,
        "--tensor-parallel-num-weight-shards",
        "its shards of weights are gathered outside the layer's call; leave it out",
    )
    yield (
        _number(args, "expert_tensor_parallel_num_weight_shards") > 1,
        "--expert-tensor-parallel-num-weight-shards",
        "its shards of weights are gathered outside the layer's call; leave it out",
    )
    yield (
        getattr(args, "freeze_all_layers", False),
        "--freeze-all-layers",
        "the router would not be trained either; leave it out",
    )
    # of 0.20
    yield (
        getattr(args, "enable_mhc_connections", False),
        "--enable-mhc-connections",
        "its layers carry several residual streams and no experts; leave it out",
    )
    yield (
        getattr(args, "mtp_hsm", False),
        "--mtp-hsm",
        "tokens would take hidden states without their routing state; leave it out",
    )


def _number(args: argparse.Namespace, name: str) -> int:
    return getattr(args, name, None) or 1
