"""What trains as what: model shapes, parallel layouts, options, and which of their combinations are run.

A case is a training run of a few iterations. It belongs to a reference: the same model and options in one process.
:mod:`.lab` runs all of them, one process group for each number of processes, and the tests here compare. The tables of
docs/layouts.md are made from this file (:mod:`.table`), so each of their cells is a case that a test has looked at.
"""

import dataclasses

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
    "--global-batch-size": 8,
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
BASE = [word for pair in SIZES.items() for word in map(str, pair)] + COMMON
PP2 = "--pipeline-model-parallel-size 2".split()
PP4 = "--pipeline-model-parallel-size 4".split()
INTERLEAVED = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1".split()
TP2_ETP2 = "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2".split()
EP2 = "--expert-model-parallel-size 2".split()
EP4 = "--expert-model-parallel-size 4".split()
CP2 = "--context-parallel-size 2".split()
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
BF16 = "--bf16 --moe-router-dtype fp32".split()
# Rounding sends a token near a tie to another expert, whose gradient is another: fewer ties move with smaller steps
BF16_GENTLY = [*BF16, *"--lr 1e-4 --min-lr 1e-5 --moe-aux-loss-coeff 0.1".split()]
LINEAR = ["--moe-router-type", "linear"]


def selective(*modules: str) -> list[str]:
    return ["--recompute-granularity", "selective", "--recompute-modules", *modules]


MOE_RECOMPUTE = selective("moe")

SHAPES: dict[str, list[str]] = {
    "base": [],
    "three layers": "--num-layers 3".split(),
    "eight layers": "--num-layers 8".split(),
    "dense layers": "--moe-layer-freq [0,0,1,1]".split(),
    "shared experts": "--moe-shared-expert-intermediate-size 32".split(),
    "multi-token prediction": "--mtp-num-layers 2".split(),
    "tied embeddings, grouped queries": "--group-query-attention --num-query-groups 2".split(),
    "expert bias": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias".split(),
    "quantile balancing": "--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0".split(),
}
LEFT_OUT = {"tied embeddings, grouped queries": ("--untie-embeddings-and-output-weights",)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is spread over processes."""

    name: str
    processes: int
    argv: list[str]
    shape: str = "base"


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
        Layout("PP2, layout Ettt|tL", 2, [*PP2, "--pipeline-model-parallel-layout", "Ettt|tL"]),
        Layout(
            "PP2, embedding counted as a layer",
            2,
            [*PP2, "--account-for-embedding-in-pipeline-split"],
            shape="three layers",
        ),
        Layout("PP4", 4, PP4),
        Layout("PP4, layout E|tt|tt|L", 4, [*PP4, "--pipeline-model-parallel-layout", "E|tt|tt|L"]),
        Layout("PP4 VPP2", 4, [*PP4, "--num-virtual-stages-per-pipeline-rank", "2"], shape="eight layers"),
        Layout("PP2 EP2", 4, [*PP2, *EP2]),
        Layout("PP2 VPP2 EP2", 4, [*INTERLEAVED, *EP2]),
        Layout("PP2 TP2 SP", 4, [*PP2, *TP2]),
        Layout("PP2 CP2", 4, [*PP2, *CP2]),
        Layout("TP2 SP CP2", 4, [*TP2, *CP2]),
        Layout("TP2 SP EP2 ETP2", 4, [*TP2_ETP2, *EP2]),
        Layout("PP2 VPP2 DP2 distributed optimizer, overlaps", 4, [*INTERLEAVED, *DISTRIBUTED_OPTIMIZER]),
        Layout("EP2 DP4 distributed optimizer, overlaps", 4, [*EP2, *DISTRIBUTED_OPTIMIZER]),
        Layout("PP2 VPP2 TP2 SP EP4", 8, [*INTERLEAVED, *TP2, *EP4]),
        Layout("PP2 TP2 SP CP2 EP2", 8, [*PP2, *TP2, *CP2, *EP2]),
    )
}

# The columns of the first table: every layout is run with each.
MODES = {"fp32": [], "fp32, full recompute": FULL_RECOMPUTE, "bf16, fp32 routing": BF16_GENTLY}
TOLERANCE = {"fp32": 5e-6, "fp32, full recompute": 5e-6, "bf16, fp32 routing": 1e-2}

# The second table: models and options, each in the layouts that could break it.
OPTIONS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    # name: (shape, arguments, layouts)
    "dense layers below": ("dense layers", DISTRIBUTED_OPTIMIZER, ("PP2", "PP2 EP2")),
    "dense layers below, full recompute": ("dense layers", FULL_RECOMPUTE, ("PP2",)),
    "dense layers below, interleaved": ("dense layers", [], ("PP2 VPP2",)),
    "dense layers, recompute mlp": ("dense layers", selective("mlp"), ("PP2",)),
    "shared experts": ("shared experts", [], ("PP2 EP2", "TP2 SP EP2")),
    "shared experts, overlapped": ("shared experts", ["--moe-shared-expert-overlap"], ("EP2 alltoall",)),
    "shared experts, recompute shared_experts": ("shared experts", selective("shared_experts"), ("EP2 alltoall",)),
    "multi-token prediction": ("multi-token prediction", [], ("PP2", "TP2 SP EP2")),
    "multi-token prediction, full recompute": ("multi-token prediction", FULL_RECOMPUTE, ("PP2",)),
    "multi-token prediction behind the last layer's stage": (
        "multi-token prediction",
        ["--pipeline-model-parallel-layout", "Ett|tt|m*2L"],
        ("PP3",),
    ),
    "tied embeddings, grouped queries": ("tied embeddings, grouped queries", [], ("PP2", "TP2 SP", "CP2")),
    "--calculate-per-token-loss": ("base", ["--calculate-per-token-loss"], ("PP2 EP2", "TP2 SP")),
    "document masks (--reset-attention-mask)": (
        "base",
        ["--reset-attention-mask", "--reset-position-ids"],
        ("PP2",),
    ),
    "full recompute, block": (
        "base",
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1".split(),
        ("PP2", "TP2 SP"),
    ),
    "full recompute, uniform over 2 layers": ("base", [*FULL_RECOMPUTE[:-1], "2"], ("PP2",)),
    "recompute moe": ("base", MOE_RECOMPUTE, ("PP2 EP2", "TP2 SP")),
    "recompute core_attn": ("base", selective("core_attn"), ("PP2", "CP2")),
    "recompute layernorm": ("base", selective("layernorm"), ("PP2", "TP2 SP EP2")),
    "recompute layernorm, moe and core_attn": ("base", selective("layernorm", "moe", "core_attn"), ("PP2",)),
    "score function sigmoid": ("base", ["--moe-router-score-function", "sigmoid"], ("PP2 EP2",)),
    "score function sqrtsoftplus": ("base", ["--moe-router-score-function", "sqrtsoftplus"], ("PP2",)),
    "--moe-router-pre-softmax": (
        "base",
        ["--moe-router-pre-softmax", "--moe-router-topk-scaling-factor", "2.0"],
        ("PP2 EP2",),
    ),
    "expert bias": ("expert bias", [], ("PP2 EP2", "TP2 SP")),
    "group-limited top-k": (
        "base",
        "--moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-pre-softmax".split(),
        ("PP2 EP2",),
    ),
    "seq_aux_loss": ("base", ["--moe-router-load-balancing-type", "seq_aux_loss"], ("PP2 EP2",)),
    "global_aux_loss": ("base", ["--moe-router-load-balancing-type", "global_aux_loss"], ("PP2", "TP2 SP")),
    "two losses at once": (
        "base",
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1.0 0.5".split(),
        ("PP2 EP2",),
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
        ("PP2",),
    ),
    "capacity factor, padded, dropping by position": (
        "base",
        "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy position --moe-pad-expert-input-to-capacity".split(),
        ("PP2",),
    ),
    "--moe-router-dtype fp64": ("base", ["--moe-router-dtype", "fp64"], ("PP2", "TP2 SP")),
    "--moe-router-force-biased": ("base", ["--moe-router-force-biased", "1.0"], ("PP2",)),
    "--moe-router-rnn-bias": ("biases", [], ("PP2", "TP2 SP")),
}
SHAPES["biases"] = ["--moe-router-rnn-bias"]
LAYOUTS["PP3"] = Layout("PP3", 3, "--pipeline-model-parallel-size 3".split(), shape="")

# What a reference in one process is not given: it is the plain way of what these do
_PLAIN = ("--recompute", "--use-distributed-optimizer", "--overlap", "--moe-shared-expert-overlap", "--pipeline")


def without_parallelism(argv: list[str]) -> list[str]:
    """The arguments that make another model or another loss."""
    kept, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            skipping = word.startswith(_PLAIN)
        if not skipping:
            kept.append(word)
    return kept


def model(shape: str) -> list[str]:
    """Arguments of a model, without a layout."""
    return [word for word in BASE if word not in LEFT_OUT.get(shape, ())] + SHAPES[shape]


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run: ``argv`` in ``processes`` processes, to be compared with ``reference``'s."""

    name: str
    processes: int
    shape: str
    argv: tuple[str, ...]
    reference: str = ""
    collect: tuple[str, ...] = ()
    fault: str | None = None
    from_start: bool = True

    def faulty(self, fault: str) -> "Case":
        """The same run with a fault planted."""
        return dataclasses.replace(self, name=f"fault: {fault}", fault=fault)


# Whose routing gradients are compared element by element
GRADIENTS = ("TP2 SP", "CP2", "EP2 alltoall", "PP2 VPP2 EP2")


def _layout_cases():
    for layout in LAYOUTS.values():
        for mode, argv in MODES.items():
            if not layout.shape:
                continue
            collect = ("weights",) if mode == "fp32" else ()
            if layout.name == "CP2" and mode == "fp32":
                collect = (*collect, "attention", "health", "evaluation")
            if layout.name in GRADIENTS and mode.startswith("fp32"):
                collect = (*collect, "gradients")
            reference = mode.removesuffix(", full recompute")
            yield Case(
                f"{layout.name} @ {mode}",
                layout.processes,
                layout.shape,
                (*layout.argv, *argv),
                f"{layout.shape} @ {reference}",
                collect,
            )


def _option_cases():
    for name, (shape, argv, layouts) in OPTIONS.items():
        for layout in map(LAYOUTS.get, layouts):
            yield Case(
                f"{layout.name} @ {name}", layout.processes, shape, (*layout.argv, *argv), _reference(shape, argv)
            )


def _reference(shape: str, argv: list[str]) -> str:
    return f"{shape} @ " + (" ".join(without_parallelism(argv)) or "fp32")


def compared() -> list[Case]:
    """The cases of both tables."""
    return [*_layout_cases(), *_option_cases()]


def references(cases: list[Case]) -> list[Case]:
    """The runs in one process that ``cases`` name."""
    found = {}
    for case in cases:
        shape, _, options = case.reference.partition(" @ ")
        argv = MODES[options] if options in MODES else options.split()
        collect = ("gradients", "health", "evaluation") if case.reference == "base @ fp32" else ()
        found[case.reference] = Case(case.reference, 1, shape, tuple(argv), collect=collect)
    return list(found.values())


# Dropout and noise draw other numbers in another layout: recompute is held against none in the same one, bit by bit.
_DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1".split()
_NOISE = {
    "dropout": _DROPOUT,
    "input jitter": "--moe-input-jitter-eps 0.1".split(),
    "force load balancing": ["--moe-router-force-load-balancing"],
}
_ALL_SELECTIVE = selective("layernorm", "moe", "core_attn")
_RECOMPUTED_NOISE = (
    ("dropout", "", FULL_RECOMPUTE),
    ("dropout", "", "--recompute-granularity full --recompute-method block --recompute-num-layers 3".split()),
    ("dropout", "", _ALL_SELECTIVE),
    ("dropout", "TP2 SP", FULL_RECOMPUTE),
    ("dropout", "TP2 SP", _ALL_SELECTIVE),
    ("dropout", "PP2 VPP2", FULL_RECOMPUTE),
    ("input jitter", "", FULL_RECOMPUTE),
    ("input jitter", "", MOE_RECOMPUTE),
    ("force load balancing", "", FULL_RECOMPUTE),
    ("force load balancing", "", MOE_RECOMPUTE),
)


def recomputed_noise() -> list[Case]:
    """Runs with recompute and random numbers; their reference has the same layout and no recompute."""
    return [
        _noisy(noise, layout, recompute, _noisy(noise, layout, []).name)
        for noise, layout, recompute in _RECOMPUTED_NOISE
    ]


def noise_references() -> list[Case]:
    """What :func:`recomputed_noise` is compared with."""
    return [_noisy(noise, layout, []) for noise, layout in dict.fromkeys(row[:2] for row in _RECOMPUTED_NOISE)]


def _noisy(noise: str, layout: str, recompute: list[str], reference: str = "") -> Case:
    spread = LAYOUTS.get(layout, Layout("1 process", 1, []))
    name = f"{spread.name} @ {noise} {' '.join(recompute)}".strip()
    argv = (*spread.argv, *_NOISE[noise], *recompute)
    return Case(name, spread.processes, "base", argv, reference)


FAULTS = {
    # name: (layout, further arguments); see breakages.py
    "detached state": ("PP2", []),
    "no gradient sync over stages": ("PP2", []),
    "counted on every stage": ("PP2", []),
    "no gradient sync over tensor ranks": ("TP2 SP", []),
    "keys' gradient not summed": ("CP2", []),
    "state recomputed without its gradient": ("PP2", FULL_RECOMPUTE),
}


def faulty() -> list[Case]:
    """Runs with a planted fault."""
    return [
        Case(
            f"fault: {fault}",
            LAYOUTS[layout].processes,
            "base",
            (*LAYOUTS[layout].argv, *argv),
            "base @ fp32",
            ("weights", "gradients", *(("attention",) if layout == "CP2" else ())),
            fault,
        )
        for fault, (layout, argv) in FAULTS.items()
    ] + [_noisy("dropout", "", FULL_RECOMPUTE, "1 process @ dropout").faulty("random state not restored")]


_TWO = ("--train-iters", "2")
_ONE_STEP_BF16 = (*BF16, "--train-iters", "1", "--clip-grad", "0")


def looked_into() -> list[Case]:
    """Runs that other things than losses are recorded of."""
    traffic, states = ("traffic",), ("gradients", "states")
    return [
        Case("states bf16 1 process", 1, "base", _ONE_STEP_BF16, collect=states),
        Case("states bf16 PP2", 2, "base", (*PP2, *_ONE_STEP_BF16), collect=states),
        Case("traffic PP2", 2, "base", (*PP2, *_TWO), collect=traffic),
        Case("traffic PP2 bf16", 2, "base", (*PP2, *_TWO, *BF16), collect=traffic),
        Case("traffic PP2 linear", 2, "base", (*PP2, *_TWO, *LINEAR), collect=traffic, from_start=False),
        Case("traffic PP2 VPP2", 2, "base", (*INTERLEAVED, *_TWO), collect=traffic),
        Case("traffic PP2 VPP2 linear", 2, "base", (*INTERLEAVED, *_TWO, *LINEAR), collect=traffic, from_start=False),
    ]


def everything() -> list[Case]:
    """All cases but those that need others' checkpoints."""
    cases = compared()
    return [
        *references(cases),
        *cases,
        *noise_references(),
        *recomputed_noise(),
        *faulty(),
        *looked_into(),
    ]
