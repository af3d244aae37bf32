"""A plan as a page of text."""

from __future__ import annotations

from rmoe_megablocks.planning.counts import memory, parameters
from rmoe_megablocks.planning.counts.flops import Flops
from rmoe_megablocks.planning.plan import Plan

Rows = list[tuple[str, ...]]


def text(plan: Plan, name: str) -> str:
    """Lines for a terminal; ``name`` is the configuration's."""
    title = f"{name}: {plan.settings.router_type} router, {_layout(plan)}, {plan.gpu_memory:g} GiB a GPU"
    parts = [
        title,
        table(_parameters(plan)),
        table(_flops(plan)),
        table(_memory(plan)),
        table(_modes(plan)),
        table(_traffic(plan)),
    ]
    parts += ["\n".join(f"warning: {line}" for line in plan.warnings)] if plan.warnings else []
    return "\n\n".join(parts)


def _layout(plan: Plan) -> str:
    s = plan.settings
    sizes = {"TP": s.tensor, "PP": s.pipeline, "VPP": s.virtual, "CP": s.context, "EP": s.expert}
    sizes["DP"] = plan.world_size // (s.tensor * s.pipeline * s.context)
    letters = " ".join(f"{letters}{size}" for letters, size in sizes.items() if size > 1)
    return f"{plan.world_size} rank{'s' * (plan.world_size > 1)}" + (f" ({letters})" if letters else "")


def _parameters(plan: Plan) -> Rows:
    s = plan.settings
    counts = {
        "total": plan.counts.total,
        "active for a token": parameters.active(s),
        "embeddings": parameters.embeddings(s),
        "routing": plan.counts.routing,
    }
    if plan.counts.frozen:
        counts["of it frozen"] = plan.counts.frozen
    rows: Rows = [("parameters", "", "of the total")]
    rows += [(key, f"{value:,}", f"{100 * value / plan.counts.total:.2f} %") for key, value in counts.items()]
    if s.pipeline > 1:
        rows += [(f"stage {rank}", f"{parameters.stage(s, rank).total:,}", "") for rank in range(s.pipeline)]
    return rows


def _flops(plan: Plan) -> Rows:
    found = plan.flops
    tokens = plan.settings.global_batch_size * plan.settings.seq_length
    step = tokens * (found.training + found.recomputed)
    rows = [
        ("MFLOP a token", "", "of the forward pass"),
        ("forward", f"{found.forward / 1e6:,.1f}", ""),
        ("routing", f"{found.routing / 1e6:,.2f}", f"{100 * found.routing / found.forward:.2f} %"),
        ("attention scores", f"{found.attention / 1e6:,.1f}", f"{100 * found.attention / found.forward:.2f} %"),
        ("forward + backward", f"{found.training / 1e6:,.1f}", ""),
        ("recomputed", f"{found.recomputed / 1e6:,.1f}", f"{100 * found.recomputed / found.forward:.2f} %"),
    ]
    if plan.settings.null_experts:
        experts = f"{plan.settings.expected_experts:.3g} of {plan.settings.topk} expected"
        rows.append((f"null experts save ({experts})", f"{found.saved / 1e6:,.1f}", _share(found)))
    if tokens:
        rows.append((f"a step of {tokens:,} tokens", f"{step / 1e15:,.2f} PFLOP", ""))
    return rows


def _share(found: Flops) -> str:
    """What is saved, of what a forward pass would take without."""
    return f"{100 * found.saved / (found.forward + found.saved):.2f} %"


def _memory(plan: Plan) -> Rows:
    found = plan.memory
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        f"activations, micro-batch {plan.settings.micro_batch_size}": found.activations,
        "workspace": found.workspace,
        "total": found.total,
        "of it routing": found.routing,
    }
    if found.frozen:
        parts["of it frozen weights"] = found.frozen
    mode = " ".join([plan.settings.recompute, *plan.settings.recompute_modules])
    rows: Rows = [(f"GiB on the fullest rank (recompute: {mode})", "")]
    rows += [(key, _gib(value)) for key, value in parts.items()]
    rows.append(("usable", _gib(memory.usable(plan.gpu_memory))))
    return rows


def _modes(plan: Plan) -> Rows:
    rows: Rows = [("recompute", "activations", "total", "routing", "largest micro-batch")]
    for mode, found in plan.by_mode.items():
        largest = plan.largest_micro_batch[mode]
        figures = (found.activations, found.total, found.routing)
        rows.append((mode, *(_gib(value) for value in figures), str(largest) if largest else "none fits"))
    return rows


def _traffic(plan: Plan) -> Rows:
    found = plan.traffic
    return [
        ("GiB a rank sends in a step", ""),
        ("pipeline", _gib(found.pipeline)),
        ("of it routing state", _gib(found.pipeline_state)),
        ("experts, all-to-all", _gib(found.all_to_all)),
        ("gradients and weights", _gib(found.data_parallel)),
    ]


def _gib(value: int) -> str:
    return f"{value / memory.GIB:,.3f}" if 0 < value < memory.GIB else f"{value / memory.GIB:,.2f}"


def table(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
