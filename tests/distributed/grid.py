"""Models, layouts and options that are compared with one process, and which with which: see docs/layouts.md."""

import dataclasses

from tests.distributed.arguments import (
    BF16_ALL_EXPERTS,
    CP2,
    DISTRIBUTED_OPTIMIZER,
    EP2,
    FULL_RECOMPUTE,
    INTERLEAVED,
    LINEAR,
    MOE_RECOMPUTE,
    PP2,
    PP4,
    TP2,
    TP2_ETP2,
    selective,
)
from tests.distributed.routers import ROUTERS

SHAPES: dict[str, list[str]] = {
    "base": [],
    "three layers": "--num-layers 3".split(),
    "eight layers, four micro-batches": "--num-layers 8 --global-batch-size 8".split(),
    "dense layers": "--moe-layer-freq [0,0,1,1]".split(),
    "shared experts": "--moe-shared-expert-intermediate-size 32".split(),
    "multi-token prediction": "--mtp-num-layers 2".split(),
    "tied embeddings, grouped queries": "--group-query-attention --num-query-groups 2".split(),
    "expert bias": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias".split(),
    "quantile balancing": "--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0".split(),
}
_LARGE = "eight layers, four micro-batches"  # for layouts that need more of either
LEFT_OUT = {"tied embeddings, grouped queries": ("--untie-embeddings-and-output-weights",)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is spread over processes."""

    name: str
    processes: int
    argv: list[str]
    shape: str = "base"  # of the first table's runs


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("TP2 SP", 2, TP2),
        Layout("TP2 SP ETP2", 2, TP2_ETP2),
        Layout("EP2 alltoall", 2, EP2),
        Layout("EP2 allgather", 2, [*EP2, "--moe-token-dispatcher-type", "allgather"]),
        Layout("TP2 SP EP2", 2, [*TP2, *EP2]),
        Layout("CP2", 2, CP2),
        Layout("CP2 EP2", 2, [*CP2, *EP2]),
        Layout("DP2", 2, []),
        Layout("DP2 distributed optimizer", 2, ["--use-distributed-optimizer"]),
        Layout("DP2 distributed optimizer, overlaps", 2, DISTRIBUTED_OPTIMIZER),
        Layout("PP2", 2, PP2),
        Layout("PP2 VPP2", 2, INTERLEAVED),
        Layout("PP2, 1 and 3 layers", 2, [*PP2, "--decoder-first-pipeline-num-layers", "1"]),
        Layout(
            "PP2, embedding counted as a layer",
            2,
            [*PP2, "--account-for-embedding-in-pipeline-split"],
            shape="three layers",
        ),
        Layout("PP4", 4, PP4),
        Layout("PP4, layout E|tt|tt|L", 4, [*PP4, "--pipeline-model-parallel-layout", "E|tt|tt|L"]),
        Layout("PP4 VPP2", 4, [*PP4, "--num-virtual-stages-per-pipeline-rank", "2"], _LARGE),
        Layout("PP2 EP2", 4, [*PP2, *EP2]),
        Layout("PP2 VPP2 EP2", 4, [*INTERLEAVED, *EP2], _LARGE),
        Layout("PP2 TP2 SP", 4, [*PP2, *TP2]),
        Layout("PP2 CP2", 4, [*PP2, *CP2]),
        Layout("TP2 SP CP2", 4, [*TP2, *CP2]),
        Layout("TP2 SP EP2 ETP2", 4, [*TP2_ETP2, *EP2]),
        Layout("PP2 VPP2 DP2 distributed optimizer, overlaps", 4, [*INTERLEAVED, *DISTRIBUTED_OPTIMIZER], _LARGE),
        Layout("EP2 DP4 distributed optimizer, overlaps", 4, [*EP2, *DISTRIBUTED_OPTIMIZER], _LARGE),
        Layout("PP2 TP2 SP CP2 EP2", 8, [*PP2, *TP2, *CP2, *EP2]),
    )
}

# The columns of the first table, and the layouts that are run with each.
MODES = {"fp32": [], "fp32, full recompute": FULL_RECOMPUTE, "bf16, fp32 routing": BF16_ALL_EXPERTS}
TOLERANCE = {"fp32": 5e-6, "fp32, full recompute": 5e-6, "bf16, fp32 routing": 1e-2}
_RECOMPUTED = (
    "TP2 SP",
    "EP2 alltoall",
    "CP2",
    "PP2 VPP2",
    "PP4, layout E|tt|tt|L",
    "PP2 VPP2 EP2",
    "PP2 VPP2 DP2 distributed optimizer, overlaps",
)
_IN_BF16 = (
    "TP2 SP",
    "EP2 alltoall",
    "CP2",
    "PP2 VPP2",
    "PP2 EP2",
    "PP2 VPP2 DP2 distributed optimizer, overlaps",
)


# Cells of more than two processes that every test run has, and cells of two that only RMOE_TEST_ALL_CELLS=1 has
ALWAYS = {
    "PP4, layout E|tt|tt|L @ fp32",
    "PP4 VPP2 @ fp32",
    "PP2 VPP2 EP2 @ fp32",
    "PP2 VPP2 EP2 @ fp32, full recompute",
    "TP2 SP EP2 ETP2 @ fp32",
    "PP2 VPP2 DP2 distributed optimizer, overlaps @ fp32",
}
NOT_ALWAYS = {
    "CP2 EP2 @ fp32",
    "PP2 VPP2 @ fp32, full recompute",
    "TP2 SP @ bf16, fp32 routing",
    "PP2 @ multi-token prediction, full recompute",
    "PP2 @ dense layers, recompute mlp",
    "EP2 alltoall @ shared experts, recompute shared_experts",
    "CP2 @ tied embeddings, grouped queries",
    "PP2 @ score function sqrtsoftplus",
    "PP2 @ --moe-router-dtype fp64",
    "DP2 @ fp32",
    "PP2, embedding counted as a layer @ fp32",
    "CP2 @ bf16, fp32 routing",
    "PP2 @ full recompute, block",
    "CP2 @ recompute core_attn",
    "TP2 SP @ recompute layernorm",
    "PP2 @ quantile balancing",
    "EP2 alltoall @ capacity factor, dropping by probs",
    "PP2 @ --moe-router-share-projector 2, --moe-router-share-head 2",
    "PP2 VPP2 @ --moe-router-share-projector 2, --moe-router-share-head 2",
    "PP2 @ --moe-router-share-projector 3, --moe-router-share-head 3",
    "PP2 VPP2 @ --moe-router-share-projector all, --moe-router-share-head all",
    "CP2 @ --moe-router-share-projector all, --moe-router-share-head all",
    "PP2 VPP2 @ projectors shared by 3 layers, full recompute",
    "DP2 @ projectors shared by 3 layers, distributed optimizer, overlaps",
    "PP2 @ projectors shared by 3 layers, distributed optimizer, overlaps",
}
# Whose routing gradients are compared element by element
GRADIENTS = ("TP2 SP", "CP2", "EP2 alltoall", "PP2 VPP2 EP2")


def modes_of(layout: str) -> list[str]:
    """The modes that ``layout`` is run with."""
    columns = {"fp32": LAYOUTS, "fp32, full recompute": _RECOMPUTED, "bf16, fp32 routing": _IN_BF16}
    return [mode for mode, layouts in columns.items() if layout in layouts]


# The second table: models and options, each in the layouts that could break it.
OPTIONS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    # name: (shape, arguments, layouts)
    "dense layers below": ("dense layers", DISTRIBUTED_OPTIMIZER, ("PP2",)),
    "dense layers below, full recompute": ("dense layers", FULL_RECOMPUTE, ("PP2 VPP2",)),
    "dense layers, recompute mlp": ("dense layers", selective("mlp"), ("PP2",)),
    "shared experts": ("shared experts", [], ("TP2 SP",)),
    "shared experts, overlapped": ("shared experts", ["--moe-shared-expert-overlap"], ("EP2 alltoall",)),
    "shared experts, recompute shared_experts": ("shared experts", selective("shared_experts"), ("EP2 alltoall",)),
    "multi-token prediction": ("multi-token prediction", [], ("TP2 SP EP2",)),
    "multi-token prediction, full recompute": ("multi-token prediction", FULL_RECOMPUTE, ("PP2",)),
    "multi-token prediction behind the last layer's stage": (
        "multi-token prediction",
        ["--pipeline-model-parallel-layout", "E|tt|tt|m*2L"],
        ("PP4",),
    ),
    "tied embeddings, grouped queries": ("tied embeddings, grouped queries", [], ("PP2", "CP2")),
    "--calculate-per-token-loss": ("base", ["--calculate-per-token-loss"], ("PP2 EP2",)),
    "document masks (--reset-attention-mask)": (
        "base",
        ["--reset-attention-mask", "--reset-position-ids"],
        ("PP2",),
    ),
    "full recompute, block": (
        "base",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1".split(),
        ("PP2",),
    ),
    "recompute moe": ("base", MOE_RECOMPUTE, ("PP2 EP2",)),
    "recompute core_attn": ("base", selective("core_attn"), ("CP2",)),
    "recompute layernorm": ("base", selective("layernorm"), ("TP2 SP",)),
    "recompute layernorm, moe and core_attn": ("base", selective("layernorm", "moe", "core_attn"), ("PP2",)),
    "score function sqrtsoftplus": ("base", ["--moe-router-score-function", "sqrtsoftplus"], ("PP2",)),
    "sigmoid scores, expert bias": ("expert bias", [], ("EP2 alltoall",)),
    "group-limited top-k, pre-softmax": (
        "base",
        "--moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-pre-softmax".split(),
        ("PP2",),
    ),
    # With the lab's own seed one weight has a first gradient of 5e-10 in one process, -3e-9 in two: rounding, of which
    # Adam's first step (g / |g|) makes 2.7e-4, and the norms are off by 1.1e-5 from then on. Not with this seed.
    "global_aux_loss": ("base", "--moe-router-load-balancing-type global_aux_loss --seed 7".split(), ("TP2 SP",)),
    "seq_aux_loss": ("base", ["--moe-router-load-balancing-type", "seq_aux_loss"], ("PP2",)),
    "aux_loss and seq_aux_loss at once": (
        "base",
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1.0 0.5".split(),
        ("EP2 alltoall",),
    ),
    "sinkhorn": (
        "base",
        "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0".split(),
        ("PP2",),
    ),
    "quantile balancing": ("quantile balancing", [], ("PP2",)),
    "capacity factor, dropping by probs": (
        "base",
        "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy probs".split(),
        ("EP2 alltoall",),
    ),
    "capacity factor, padded, dropping by position": (
        "base",
        "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy position --moe-pad-expert-input-to-capacity".split(),
        ("PP2",),
    ),
    "--moe-router-dtype fp64": ("base", ["--moe-router-dtype", "fp64"], ("PP2",)),
    "--moe-router-rnn-bias": ("biases", [], ("TP2 SP",)),
    "--moe-router-init fan_in, biases": ("fan_in", [], ("PP2", "EP2 alltoall")),
    "--moe-router-share-projector 2, --moe-router-share-head 2": ("shared in twos", [], ("PP2", "PP2 VPP2", "TP2 SP")),
    "--moe-router-share-projector 3, --moe-router-share-head 3": ("shared in threes", [], ("PP2", "PP2 VPP2", "PP4")),
    "--moe-router-share-projector all, --moe-router-share-head all": ("shared by all", [], ("PP2 VPP2", "CP2")),
    "projectors shared by 3 layers, full recompute": ("shared in threes", FULL_RECOMPUTE, ("PP2 VPP2",)),
    "projectors shared by 3 layers, distributed optimizer, overlaps": (
        "shared in threes",
        DISTRIBUTED_OPTIMIZER,
        ("DP2", "PP2", "PP2 VPP2"),
    ),
    "projectors shared by 3 of 8 layers, distributed optimizer, overlaps": (
        "eight layers shared in threes",
        DISTRIBUTED_OPTIMIZER,
        ("PP2 VPP2 EP2",),
    ),
    "projectors shared by 2 layers, dense ones between": (
        "dense layers shared in twos",
        DISTRIBUTED_OPTIMIZER,
        ("PP2",),
    ),
}
SHAPES["shared in twos"] = "--moe-router-share-projector 2 --moe-router-share-head 2".split()
SHAPES["shared in threes"] = [
    *"--moe-router-share-projector 3 --moe-router-share-head 3".split(),
    "--moe-router-rnn-bias",
]
SHAPES["shared by all"] = "--moe-router-share-projector all --moe-router-share-head all --moe-router-head xmoe".split()
SHAPES["eight layers shared in threes"] = [*SHAPES[_LARGE], *SHAPES["shared in threes"]]
SHAPES["dense layers shared in twos"] = ["--moe-layer-freq", "[1,0,0,1]", *SHAPES["shared in twos"]]
# Null experts: more of them than real ones, so that some tokens have no real expert
NULL_EXPERTS = ["--moe-null-experts", "5"]
SHAPES["null experts"] = NULL_EXPERTS
SHAPES["null experts, linear"] = [*NULL_EXPERTS, *LINEAR]
SHAPES["null experts, shared ones"] = [*NULL_EXPERTS, "--moe-shared-expert-intermediate-size", "32"]
_SPREAD = ("TP2 SP", "EP2 alltoall", "EP2 allgather", "PP2", "CP2", "TP2 SP ETP2", "TP2 SP EP2", "PP2 EP2")
OPTIONS |= {
    "null experts": ("null experts", [], _SPREAD),
    "null experts, linear": ("null experts, linear", [], _SPREAD[:4]),
    "null experts, distributed optimizer": ("null experts", DISTRIBUTED_OPTIMIZER, ("DP2",)),
    "null experts, full recompute": ("null experts", FULL_RECOMPUTE, ("EP2 alltoall", "PP2 VPP2")),
    "null experts, recompute moe": ("null experts", MOE_RECOMPUTE, ("EP2 alltoall",)),
    "null experts, shared experts": ("null experts, shared ones", [], ("EP2 alltoall",)),
    "null experts, --calculate-per-token-loss": ("null experts", ["--calculate-per-token-loss"], ("EP2 alltoall",)),
    "null experts, seq_aux_loss": (
        "null experts",
        ["--moe-router-load-balancing-type", "seq_aux_loss"],
        ("EP2 alltoall",),
    ),
    "null experts, global_aux_loss": (
        "null experts",
        ["--moe-router-load-balancing-type", "global_aux_loss"],
        ("TP2 SP",),
    ),
    "null experts, sigmoid": ("null experts", ["--moe-router-score-function", "sigmoid"], ("EP2 alltoall",)),
}
# Every test run has these of them
_NULL_ALWAYS = {
    "TP2 SP @ null experts",
    "EP2 alltoall @ null experts",
    "PP2 @ null experts",
    "EP2 alltoall @ null experts, linear",
    "EP2 allgather @ null experts, linear",
}
NOT_ALWAYS |= {
    f"{layout} @ {name}"
    for name, (_, _, layouts) in OPTIONS.items()
    for layout in layouts
    if name.startswith("null experts") and f"{layout} @ {name}" not in _NULL_ALWAYS
}
SHAPES["biases"] = ["--moe-router-rnn-bias"]
SHAPES["fan_in"] = ["--moe-router-init", "fan_in", "--moe-router-rnn-bias"]


MORE_BATCHES = ", four micro-batches"  # which two data-parallel ranks with virtual stages need


def router_shape(router: str, more: str = "") -> str:
    """The shape of the base model with another router, with ``more`` MORE_BATCHES."""
    return f"router {router}{more}"


SHAPES |= {router_shape(name): router.argv for name, router in ROUTERS.items()}
SHAPES |= {
    router_shape(name, MORE_BATCHES): [*router.argv, "--global-batch-size", "8"] for name, router in ROUTERS.items()
}
