"""Writes docs/layouts.md from the cases and refusals that the tests run: ``python -m tests.distributed.table``."""

from pathlib import Path

from tests.distributed import router_cases
from tests.distributed.cases import compared, is_always_run
from tests.distributed.further_cases import ROUTES, recomputed_noise
from tests.distributed.grid import LAYOUTS, MODES, modes_of
from tests.distributed.refused import REFUSED
from tests.distributed.routers import ROUTERS

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"

INTRODUCTION = """\
# What the recurrent router works with

Every cell that says "works" is a training run of ten iterations, six in every test run, whose loss and gradient norm
are compared, iteration by iteration, with the same model in one process without recompute: within 5e-6 relative in
fp32, 1e-2 in bf16 (where every token takes all experts: rounding moves a token near a tie to another expert, a step
that no tolerance covers). An empty cell has not been run. `bash tests/run.sh` runs the cells without ¹, on gloo; those
with ¹ take longer:

```bash
RMOE_TEST_ALL_CELLS=1 bash tests/run.sh tests/distributed tests/megatron/experts
```

Nothing here has been run on GPUs. This page is written by `python -m tests.distributed.table`, and a test holds it
against the cases.

TP: tensor parallel, SP: sequence parallel, EP: expert parallel, ETP: experts split over tensor ranks, CP: context
parallel, DP: data parallel, PP: pipeline stages, VPP: virtual stages on each. Layout strings are those of
`--pipeline-model-parallel-layout`: E embedding, t a layer, m multi-token prediction, L loss.
"""

NOTES = """\
What to know beside the tables:

- **Multi-token prediction** layers start from h_0 = 0. Their input joins a hidden state with the embedding of another
  token, while the decoder's state has followed one token's way through the experts; they are left out at inference,
  which must not depend on them; and no stage behind the last decoder layer needs a state to be sent. They share the
  GRU, which their loss trains as well. They must be on the stage of the loss.
- **Dense layers** pass the state through untouched. Before the first MoE layer it is zero.
- **Stages without a layer** (the embedding or the loss alone) pad or strip the message.
- **Packed sequences** (`packed_seq_params`) need Transformer Engine's attention. The router sees one token at a time,
  so packing changes nothing in it; where Megatron gives packed micro-batches their batch dimension back for the MoE
  layer, the state goes with them. `--reset-attention-mask` keeps documents apart without Transformer Engine.
- **Padding masks, router replay and router trace** work (`tests/megatron/recurrence/test_model.py`).
- **Dropout, input jitter and random routing** draw other numbers in another layout, here as everywhere in Megatron.
"""


ROUTERS_INTRODUCTION = """\
All types that are registered, each with the base model's arguments, held against one process within 2e-6 in fp32. Runs
resumed in PP2 go on from its half bit for bit; the ways to other layouts start from the same checkpoint. The cells with
¹ of one type: `RMOE_TEST_ALL_CELLS=1 bash tests/run.sh tests/distributed/test_routers.py -k gru`. A planted fault is a
run on two stages that must differ from one process by more than 2e-5. `eda` has a seed of its own in TP2 SP: see
`tests/distributed/router_cases.py`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        (
            INTRODUCTION,
            "## Layouts\n",
            _table(("layout", "processes", *MODES), _layout_rows()),
            "## Models and options\n",
            "Compared with one process in the layouts named.\n",
            _table(("model or option", "works in"), _option_rows()),
            "## Router types and what changes them\n",
            ROUTERS_INTRODUCTION,
            _table(("router", *router_cases.CELLS, *router_cases.RESUMPTIONS), _router_rows()),
            _table(("planted fault", "noticed with"), _fault_rows()),
            _table(("frozen weights stay as drawn in", "of"), _frozen_rows()),
            NOTES,
            "## Recompute with random numbers\n",
            "The same run with and without recompute, same layout: equal within 5e-6, so the generators are restored\n"
            "(without that, the difference is above 1e-3).\n",
            _table(("layout", "random", "recompute"), _noise_rows()),
            "## From one layout to another\n",
            "Saved after five iterations in one layout, resumed in another, compared with one process for the other\n"
            "five (fp32, 5e-6). What a checkpoint survives is in [checkpoints.md](checkpoints.md).\n",
            _table(("saved in", "resumed in"), _route_rows()),
            "## Refused\n",
            "Before training starts, in one line that says what to do instead.\n",
            _table(("arguments", "reason"), _refused_rows()),
        )
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _layout_rows() -> list[tuple[str, ...]]:
    rows = []
    for layout in LAYOUTS.values():
        cells = (_works(f"{layout.name} @ {mode}") if mode in modes_of(layout.name) else "" for mode in MODES)
        rows.append((layout.name, str(layout.processes), *cells))
    return rows


def _works(name: str) -> str:
    case = next(case for case in compared() if case.name == name)
    return "works" if is_always_run(case) else "works ¹"


def _option_rows() -> list[tuple[str, ...]]:
    layouts: dict[str, list[str]] = {}
    for case in compared():
        layout, _, option = case.name.partition(" @ ")
        if option not in MODES:
            layouts.setdefault(option, []).append(layout if is_always_run(case) else f"{layout} ¹")
    return [(option, ", ".join(names)) for option, names in layouts.items()]


def _router_rows() -> list[tuple[str, ...]]:
    rows = []
    for router in ROUTERS.values():
        has = router_cases.columns(router)
        columns = (*router_cases.CELLS, *router_cases.RESUMPTIONS)
        cells = (_router_cell(router.name, column, "works") if column in has else "" for column in columns)
        rows.append((f"`{router.name}`", *cells))
    return rows


def _router_cell(router: str, column: str, text: str) -> str:
    return text if router_cases.is_always_run(router, column) else f"{text} ¹"


def _fault_rows() -> list[tuple[str, ...]]:
    return [(fault, _routers_with(fault)) for fault in router_cases.FAULTS]


def _frozen_rows() -> list[tuple[str, ...]]:
    return [(f"{column}, resumed too", _routers_with(column)) for column in router_cases.FROZEN]


def _routers_with(column: str) -> str:
    having = [router.name for router in ROUTERS.values() if column in router_cases.columns(router)]
    return ", ".join(_router_cell(router, column, f"`{router}`") for router in having)


def _noise_rows() -> list[tuple[str, ...]]:
    rows = []
    for case in recomputed_noise(all_of_them=True):
        layout, _, rest = case.name.partition(" @ ")
        noise, _, recompute = rest.partition(" --")
        rows.append((layout, noise, f"`--{recompute}`"))
    return rows


def _route_rows() -> list[tuple[str, ...]]:
    def end(layout: str, argv: tuple[str, ...]) -> str:
        return f"{layout} `{' '.join(argv)}`" if argv else layout

    return [(end(*start), end(*finish)) for start, finish in ROUTES]


def _refused_rows() -> list[tuple[str, ...]]:
    return [(f"`{words}`", reason) for words, reason in REFUSED.items()]


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
