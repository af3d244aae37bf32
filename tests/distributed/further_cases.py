"""Cases beside the two tables: random numbers, planted faults, what is looked into, and ways to another layout."""

from tests.distributed import router_cases
from tests.distributed.arguments import (
    ALL_CELLS,
    BF16,
    FULL_RECOMPUTE,
    INTERLEAVED,
    ITERATIONS,
    LINEAR,
    MOE_RECOMPUTE,
    PP2,
    selective,
)
from tests.distributed.cases import Case, references, selected
from tests.distributed.grid import LAYOUTS, Layout

# Dropout and noise draw other numbers in another layout: recompute is held against none in the same one, bit by bit.
_DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1".split()
_NOISE = {
    "dropout": _DROPOUT,
    "input jitter": "--moe-input-jitter-eps 0.1".split(),
    "force load balancing": ["--moe-router-force-load-balancing"],
}
_ALL_SELECTIVE = selective("layernorm", "moe", "core_attn")
_ALWAYS_RECOMPUTED = [
    ("dropout", "", FULL_RECOMPUTE),
    ("dropout", "", _ALL_SELECTIVE),
    ("dropout", "PP2 VPP2", FULL_RECOMPUTE),
    ("input jitter", "", FULL_RECOMPUTE),
    ("force load balancing", "", MOE_RECOMPUTE),
]
_RECOMPUTED_NOISE = [
    *_ALWAYS_RECOMPUTED,
    ("dropout", "", "--recompute-granularity full --recompute-method block --recompute-num-layers 3".split()),
    ("dropout", "TP2 SP", FULL_RECOMPUTE),
]


def recomputed_noise(all_of_them: bool = ALL_CELLS) -> list[Case]:
    """Runs with recompute and random numbers; their reference has the same layout and no recompute."""
    return [
        _noisy(noise, layout, recompute, _noisy(noise, layout, []).name)
        for noise, layout, recompute in (_RECOMPUTED_NOISE if all_of_them else _ALWAYS_RECOMPUTED)
    ]


def noise_references() -> list[Case]:
    """What :func:`recomputed_noise` is compared with."""
    without = dict.fromkeys((noise, layout) for noise, layout, _ in _RECOMPUTED_NOISE)
    needed = {case.reference for case in recomputed_noise()}
    return [case for noise, layout in without if (case := _noisy(noise, layout, [])).name in needed]


def _noisy(noise: str, layout: str, recompute: list[str], reference: str = "") -> Case:
    spread = _spread(layout)
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
    """Runs that something else than losses is looked at in."""
    traffic, states = ("traffic",), ("gradients", "states")
    return [
        Case("states bf16 1 process", 1, "base", _ONE_STEP_BF16, collect=states),
        Case("states bf16 PP2", 2, "base", (*PP2, *_ONE_STEP_BF16), collect=states),
        Case("traffic PP2", 2, "base", (*PP2, *_TWO), collect=traffic),
        Case("traffic PP2 bf16", 2, "base", (*PP2, *_TWO, *BF16), collect=traffic),
        Case("traffic PP2 linear", 2, "base", (*PP2, *_TWO, *LINEAR), collect=traffic, from_start=False),
        Case("traffic PP2 VPP2", 2, "base", (*INTERLEAVED, *_TWO), collect=traffic),
        Case("traffic PP2 VPP2 linear", 2, "base", (*INTERLEAVED, *_TWO, *LINEAR), collect=traffic, from_start=False),
        Case("ranks that chose differently", 2, "base", (*PP2,), fault="another checkpoint on rank 1", may_fail=True),
    ]


_UNTRAINED = ("--train-iters", "1", "--lr", "0", "--min-lr", "0")
DRAWN = {"gru": ("--moe-router-rnn-bias",), "linear": tuple(LINEAR)}
DRAWN_IN = ("1 process", "TP2 SP", "EP2 alltoall", "PP2")


def drawn_name(router: str, layout: str) -> str:
    """The case of :func:`drawn`."""
    return f"{router} drawn by fan_in in {layout}"


def drawn() -> list[Case]:
    """Runs that show which numbers each layout starts from, with --moe-router-init fan_in."""
    return [
        Case(
            drawn_name(router, layout),
            _spread(layout).processes,
            "base",
            (*_spread(layout).argv, *argv, "--moe-router-init", "fan_in", *_UNTRAINED),
            collect=("weights",),
            from_start=False,
        )
        for router, argv in DRAWN.items()
        for layout in DRAWN_IN
    ]


HALF = ITERATIONS // 2
_RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
_ASYNC = ("--async-save",)

# From one layout to another: (saved in, its further arguments), (resumed in, its further arguments)
_Half = tuple[str, tuple[str, ...]]
_ALWAYS_ROUTES: list[tuple[_Half, _Half]] = [
    (("1 process", ()), ("PP2 VPP2", ())),
    (("PP2", _ASYNC), ("PP4", ())),
    (("PP2 VPP2", ()), ("TP2 SP ETP2", ())),
    (("DP2", ("--use-distributed-optimizer",)), ("1 process", ("--use-distributed-optimizer",))),
    (("DP2", (*_RESHARDABLE, *_ASYNC)), ("PP2 VPP2", _RESHARDABLE)),
    (("TP2 SP ETP2", _RESHARDABLE), ("CP2", _RESHARDABLE)),
    (("EP2 alltoall", ()), ("TP2 SP EP2", ())),
]
ROUTES = [
    *_ALWAYS_ROUTES,
    (("PP2", ("--no-ckpt-fully-parallel-save",)), ("PP2, 1 and 3 layers", ())),
    (("TP2 SP ETP2", ()), ("PP2", ())),
    (("CP2", ()), ("DP2", ())),
    (("PP4", ()), ("1 process", ())),
    (("EP2 alltoall", _RESHARDABLE), ("PP2 EP2", _RESHARDABLE)),
]
_RUN_ROUTES = ROUTES if ALL_CELLS else _ALWAYS_ROUTES


def _spread(layout: str) -> Layout:
    return LAYOUTS.get(layout, Layout("1 process", 1, []))


def route_name(start: tuple[str, tuple[str, ...]], end: tuple[str, tuple[str, ...]]) -> str:
    """A route's name, also that of its second half."""
    return " -> ".join(" ".join((layout, *argv)) for layout, argv in (start, end))


def _half(layout: str, argv: tuple[str, ...]) -> Case:
    spread, folder = _spread(layout), " ".join(("half", layout, *argv))
    saving = ("--save", f"{{folder}}/{folder}", "--save-interval", str(HALF), "--exit-interval", str(HALF))
    return Case(folder, spread.processes, "base", (*spread.argv, *argv, *saving))


def first_halves() -> list[Case]:
    """Runs that stop half way and save."""
    return [_half(*start) for start in dict.fromkeys(start for start, _ in _RUN_ROUTES)]


def second_halves() -> list[Case]:
    """Runs that go on from there in another layout."""
    result = []
    for start, (layout, argv) in _RUN_ROUTES:
        spread, name = _spread(layout), route_name(start, (layout, argv))
        argv = (*spread.argv, *argv, "--load", f"{{folder}}/{_half(*start).name}", "--no-checkpoints")
        result.append(Case(name, spread.processes, "base", argv, "base @ fp32", from_start=False))
    return result


def _second_halves_in_turn() -> list[Case]:
    """Those that find their checkpoints when all cases run in the order of their numbers of processes."""
    return [
        case
        for case, ((layout, _), _) in zip(second_halves(), _RUN_ROUTES, strict=True)
        if _spread(layout).processes <= case.processes
    ]


def everything() -> list[Case]:
    """All cases, those first whose checkpoints others load, but for second halves in fewer processes."""
    cases = selected()
    return [
        *references(cases),
        *cases,
        *noise_references(),
        *recomputed_noise(),
        *faulty(),
        *looked_into(),
        *drawn(),
        *first_halves(),
        *_second_halves_in_turn(),
        *([] if ALL_CELLS else router_cases.everything()[0]),  # all of them have a lab of their own
    ]
