"""What trains as what: model shapes, parallel layouts, options, and which of their combinations are run.

A case is a training run of a few iterations. It belongs to a reference: the same model and options in one process.
:mod:`.lab` runs all of them, one process group for each number of processes, and the tests here compare. The tables of
docs/layouts.md are made from this file (:mod:`.table`), so each of their cells is a case that a test has looked at.
"""

import dataclasses

from tests.distributed.arguments import ALL_CELLS, BASE, ITERATIONS
from tests.distributed.grid import ALWAYS, GRADIENTS, LAYOUTS, LEFT_OUT, MODES, NOT_ALWAYS, OPTIONS, SHAPES, modes_of

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
    kept = [word for word in BASE if word not in LEFT_OUT.get(shape, ())]
    return [*kept, "--train-iters", str(ITERATIONS), *SHAPES[shape]]


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
    may_fail: bool = False
    from_start: bool = True

    def faulty(self, fault: str) -> "Case":
        """The same run with a fault planted."""
        return dataclasses.replace(self, name=f"fault: {fault}", fault=fault)


def _layout_cases():
    for layout in LAYOUTS.values():
        for mode in modes_of(layout.name):
            argv = MODES[mode]
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


def selected() -> list[Case]:
    """The cells of every test run; with RMOE_TEST_ALL_CELLS=1 all of them."""
    if ALL_CELLS:
        return compared()
    return [case for case in compared() if is_always_run(case)]


def is_always_run(case: Case) -> bool:
    """Whether a cell belongs to every test run: few need more than two processes, which take their time."""
    return case.name in ALWAYS if case.processes > 2 else case.name not in NOT_ALWAYS


def references(cases: list[Case]) -> list[Case]:
    """The runs in one process that ``cases`` name."""
    found = {}
    for case in cases:
        shape, _, options = case.reference.partition(" @ ")
        argv = MODES[options] if options in MODES else options.split()
        collect = ("gradients", "health", "evaluation") if case.reference.endswith(" @ fp32") else ()
        found[case.reference] = Case(case.reference, 1, shape, tuple(argv), collect=collect)
    return list(found.values())
