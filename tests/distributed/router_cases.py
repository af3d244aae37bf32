"""Runs of every router type and modifier: one process, layouts, a restart, ways to other layouts, planted faults."""

from collections.abc import Iterable

from tests.distributed.arguments import ALL_CELLS, BF16, DISTRIBUTED_OPTIMIZER, FULL_RECOMPUTE, ITERATIONS
from tests.distributed.cases import Case
from tests.distributed.grid import LAYOUTS, MORE_BATCHES, router_shape
from tests.distributed.routers import ROUTERS, Router

TOLERANCE = 2e-6
HALF = ITERATIONS // 2
LATE = HALF + (ITERATIONS - HALF) // 2
OVERLAPPED_STAGES = "PP2 VPP2 DP2 distributed optimizer, overlaps"
#: columns of the table that are held against one process, over all iterations
CELLS: dict[str, tuple[str, list[str]]] = {
    # name: (layout, further arguments)
    "PP2": ("PP2", []),
    "PP2, full recompute": ("PP2", FULL_RECOMPUTE),
    "TP2 SP": ("TP2 SP", []),
    "EP2 alltoall": ("EP2 alltoall", []),
    "DP2 distributed optimizer, overlaps": ("DP2 distributed optimizer, overlaps", []),
    OVERLAPPED_STAGES: (OVERLAPPED_STAGES, []),  # of routers that share something
}
# With the lab's own seed one expert's weight has a first gradient of -5.8e-9 in one process, -4.0e-9 in two: rounding,
# of which Adam's first step (g / |g|) makes 8e-5, and a norm is off by 2.1e-6 later (2.1e-7 with SGD).
_SEEDS = {("eda", "TP2 SP"): 7}
RESUMED, INTERLEAVED_NEXT, ONE_PROCESS_LAST = "resumed in PP2", "PP2 -> PP2 VPP2", "PP2 -> PP2 VPP2 -> 1 process"
RESUMPTIONS = (RESUMED, INTERLEAVED_NEXT, ONE_PROCESS_LAST)
#: name: whether a router has what it breaks; all on two stages, see breakages.py
FAULTS = {
    "detached state": lambda router: router.gives_gradients_back,
    "no gradient sync over stages": lambda router: router.shares,
    "frozen weights trained": lambda router: bool(router.frozen),
}
#: runs of routers with frozen weights, with weight decay; each is saved half way and resumed
FROZEN: dict[str, list[str]] = {
    "DP2, weight decay": [],
    "DP2, weight decay, bf16": BF16,
    "DP2 distributed optimizer, overlaps, weight decay": DISTRIBUTED_OPTIMIZER,
    "DP2 distributed optimizer, overlaps, weight decay, bf16": [*DISTRIBUTED_OPTIMIZER, *BF16],
}
_WEIGHT_DECAY = ["--weight-decay", "0.1"]


def is_always_run(router: str, column: str) -> bool:
    """Whether a cell belongs to every test run: two stages for types that have more than matrices of each layer, and
    what the rest is most likely to miss."""
    always = {
        RESUMED: ("hyper", "lstm"),
        "DP2 distributed optimizer, overlaps": ("eda", "omni"),
        "detached state": ("lstm", "eda"),
        "no gradient sync over stages": ("omni",),
        "frozen weights trained": ("random",),
        "DP2 distributed optimizer, overlaps, weight decay, bf16": ("hyper",),
    }
    if column == "PP2":
        kind = ROUTERS[router]
        more = kind.gives_gradients_back or kind.shares or bool(kind.frozen)
        return (more and not kind.chosen) or router in _ALWAYS_MODIFIED
    return router in always.get(column, ())


_ALWAYS_MODIFIED = ("mlp --moe-router-residual 0.5", "gru --moe-router-head xmoe")


def is_run(router: str, column: str) -> bool:
    """Whether this test run has the cell."""
    return ALL_CELLS or is_always_run(router, column)


def case_name(router: str, column: str) -> str:
    """Of the case in a cell."""
    return f"{column} @ {router}"


def reference(router: str, column: str = "") -> Case:
    """The router in one process, that ``column`` is held against."""
    more, seed = MORE_BATCHES if column == OVERLAPPED_STAGES else "", _seed(router, column)
    name = case_name(router, " ".join(("1 process" + more, *seed)))
    return Case(name, 1, router_shape(router, more), seed)


def _seed(router: str, column: str) -> tuple[str, ...]:
    return ("--seed", str(_SEEDS[router, column])) if (router, column) in _SEEDS else ()


def _case(router: str, column: str, layout: str, argv: list[str], **more) -> Case:
    spread, one = LAYOUTS[layout], reference(router, column)
    argv = (*spread.argv, *argv, *one.argv)
    return Case(case_name(router, column), spread.processes, one.shape, argv, one.name, _collected(router), **more)


def _collected(router: str) -> tuple[str, ...]:
    return ("weights",) if ROUTERS[router].frozen else ()


def _saving(router: str, column: str, interval: int) -> list[str]:
    return ["--save", f"{{folder}}/saved {_folder(router, column)}", "--save-interval", str(interval)]


def _loading(router: str, column: str, step: int) -> list[str]:
    return ["--load", f"{{folder}}/saved {_folder(router, column)}", "--ckpt-step", str(step)]


def _folder(router: str, column: str) -> str:
    return case_name(router, column).replace(",", "")


def cell(router: str, column: str) -> Case:
    """A run to be held against one process."""
    layout, argv = CELLS[column]
    saved = column == "PP2" and any(is_run(router, later) for later in RESUMPTIONS)
    return _case(router, column, layout, [*argv, *(_saving(router, column, HALF) if saved else [])])


def resumption(router: str, column: str) -> Case:
    """A run that goes on from the half of the one on two stages, or the last part of the way to one process."""
    if column == RESUMED:
        return _case(router, column, "PP2", _loading(router, "PP2", HALF), from_start=False)
    if column == INTERLEAVED_NEXT:
        argv = [*_loading(router, "PP2", HALF), *_saving(router, column, LATE)]
        return _case(router, column, "PP2 VPP2", argv, from_start=False)
    argv = (*_loading(router, INTERLEAVED_NEXT, LATE), "--no-checkpoints")
    return Case(
        case_name(router, column),
        1,
        router_shape(router),
        argv,
        case_name(router, "1 process"),
        _collected(router),
        from_start=False,
    )


def faulty(router: str, fault: str) -> Case:
    """A run on two stages with a planted fault."""
    return _case(router, fault, "PP2", [], fault=fault)


def decayed(router: str, column: str) -> Case:
    """A run of a router with frozen weights, to the end with a checkpoint half way."""
    return _case(router, column, "DP2", [*FROZEN[column], *_WEIGHT_DECAY, *_saving(router, column, HALF)])


def decayed_resumed(router: str, column: str) -> Case:
    """The second half of :func:`decayed` again."""
    argv = [*FROZEN[column], *_WEIGHT_DECAY, *_loading(router, column, HALF)]
    return _case(router, column + ", resumed", "DP2", argv, from_start=False)


def columns(router: Router) -> dict[str, tuple[Case, ...]]:
    """All runs in which ``router`` has something to show, by column, those first that others continue."""
    this = router.name
    found = {column: (cell(this, column),) for column in CELLS if router.shares or column != OVERLAPPED_STAGES}
    found |= {column: (resumption(this, column),) for column in RESUMPTIONS}
    found |= {fault: (faulty(this, fault),) for fault, fits in FAULTS.items() if fits(router)}
    if router.frozen:
        found |= {column: (decayed(this, column), decayed_resumed(this, column)) for column in FROZEN}
    return found


def everything(routers: Iterable[str] = ROUTERS) -> tuple[list[Case], list[Case]]:
    """The cases of this test run, and those that load what others of more processes have saved."""
    first, last = [], []
    for router in (ROUTERS[name] for name in ROUTERS if name in routers):
        chosen = {column: cases for column, cases in columns(router).items() if is_run(router.name, column)}
        last += chosen.pop(ONE_PROCESS_LAST, ())
        if chosen:
            first += {reference(router.name, column): None for column in chosen}
            first += [case for cases in chosen.values() for case in cases]
    return first, last
