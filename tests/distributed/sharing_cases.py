"""What layers share beside the cell, on stages that hold different parts of a block: faults, gradients, restarts."""

from tests.distributed.arguments import ALL_CELLS, BF16, DISTRIBUTED_OPTIMIZER, INTERLEAVED, PP2, PP4, TP2_ETP2
from tests.distributed.cases import Case, references
from tests.distributed.further_cases import HALF

SHAPE = "shared in threes"  # of four layers: the first block has layers on both stages of two
REFERENCE = f"{SHAPE} @ fp32"
FAULT = "shared projectors not synced over stages"
RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
BF16_STEP = (*BF16, "--train-iters", "1", "--clip-grad", "0")

# (name, processes, arguments)
ONE, TWO, VIRTUAL = ("1 process", 1, []), ("PP2", 2, PP2), ("PP2 VPP2", 2, INTERLEAVED)

_ROUTES = [(TWO, VIRTUAL)]
_FURTHER_ROUTES = [
    (VIRTUAL, ONE),
    (TWO, TWO),
    (ONE, ("TP2 SP ETP2", 2, TP2_ETP2)),
    (("PP4", 4, PP4), TWO),
    (("DP2 overlaps", 2, DISTRIBUTED_OPTIMIZER), ("DP2 overlaps", 2, DISTRIBUTED_OPTIMIZER)),
    (("PP2 reshardable", 2, [*PP2, *RESHARDABLE]), ("TP2 SP ETP2 reshardable", 2, [*TP2_ETP2, *RESHARDABLE])),
]
ROUTES = _ROUTES + _FURTHER_ROUTES * ALL_CELLS


def everything() -> list[Case]:
    """All runs, but for second halves in fewer processes than the first."""
    looked_at = Case("shared, in stages", 2, SHAPE, tuple(PP2), REFERENCE, ("weights", "gradients"))
    halves = {start[0]: _half(*start) for start, _ in ROUTES}
    return [
        *references([looked_at]),
        looked_at,
        looked_at.faulty(FAULT),
        Case("shared bf16 1 process", 1, SHAPE, BF16_STEP, collect=("gradients",)),
        Case("shared bf16 PP2 VPP2", 2, SHAPE, (*INTERLEAVED, *BF16_STEP), collect=("gradients",)),
        *halves.values(),
        *(case for case, (start, end) in zip(second_halves(), ROUTES, strict=True) if start[1] <= end[1]),
    ]


def _half(name: str, processes: int, argv: list[str]) -> Case:
    folder = f"shared half {name}"
    saving = ("--save", f"{{folder}}/{folder}", "--save-interval", str(HALF), "--exit-interval", str(HALF))
    return Case(folder, processes, SHAPE, (*argv, *saving))


def second_halves() -> list[Case]:
    """Runs that go on from a first half in another layout, or in the same one."""
    return [
        Case(
            f"shared {start[0]} -> {name}",
            processes,
            SHAPE,
            (*argv, "--load", f"{{folder}}/shared half {start[0]}", "--no-checkpoints"),
            REFERENCE,
            from_start=False,
        )
        for start, (name, processes, argv) in ROUTES
    ]
