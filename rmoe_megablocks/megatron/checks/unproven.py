"""Options of Megatron that a recurrent router was never tried with, those of releases after 0.19 among them.

Refused by name until somebody has proven them: what they do to the routing state would show as a slightly worse model
at most. An argument that this Megatron does not have counts as not given.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from rmoe_megablocks.megatron.experts.backend import expert_tensor_size

# They run the MoE layer in pieces, at another time or more than once a forward pass, or move what it has saved for the
# backward pass. All but the first need Transformer Engine on a GPU.
_OTHER_CALLS = (
    "mtp_use_repeated_layer",
    "cpu_offloading_num_layers",
    "delay_wgrad_compute",
    "ep_overlap_early_attn_memory_release",
    "fine_grained_activation_offloading",
    "moe_paged_stash",
    "overlap_dispatch_backward_with_experts_wgrad",
)


def refusals(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    """(whether it applies, the option, what to use instead)."""
    # once validated, they are the tensor-parallel size where nobody asked for more
    yield (
        _number(args, "tensor_parallel_num_weight_shards") > args.tensor_model_parallel_size,
        "--tensor-parallel-num-weight-shards",
        "its shards of weights are gathered outside the layer's call; leave it out",
    )
    yield (
        _number(args, "expert_tensor_parallel_num_weight_shards") > expert_tensor_size(args),
        "--expert-tensor-parallel-num-weight-shards",
        "its shards of weights are gathered outside the layer's call; leave it out",
    )
    yield (
        getattr(args, "freeze_all_layers", False),
        "--freeze-all-layers",
        "the router would not be trained either; leave it out",
    )
    for name in ("mlp_chunks_for_training", "mlp_chunks_for_prefill"):
        yield (
            _number(args, name) > 1,
            "--" + name.replace("_", "-"),
            "it calls the router for one piece of the sequence after another, and a state belongs to all tokens",
        )
    for name in _OTHER_CALLS:
        yield (
            getattr(args, name, None),
            "--" + name.replace("_", "-"),
            "nobody has shown that the state and its gradient survive it; leave it out",
        )
    yield args.use_mup, "--use-mup", "it scales learning rates by width, and knows no recurrence; leave it out"
    yield args.optimizer not in ("adam", "sgd"), f"--optimizer {args.optimizer}", "use adam or sgd"
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
