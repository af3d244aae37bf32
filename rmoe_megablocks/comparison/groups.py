"""Which runs belong together, and what else differs between those that are compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rmoe_megablocks.comparison.runs import Run
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.routing import RECURRENCE, RESIDUAL, all_arguments

ROUTER = "router"
_TYPE = "moe_router_type"
#: what does not change what is learnt: names, places, logging, and what Megatron derives from the machine
_IMMATERIAL = frozenset(
    "seed run_name runs_dir data_cache_path tensorboard_dir wandb_save_dir wandb_exp_name wandb_project save load "
    "save_interval non_persistent_save_interval log_interval tensorboard_log_interval no_checkpoints rank local_rank "
    "no_final_evaluation eval_tokens dataset data_path train_data_path valid_data_path test_data_path config "
    "distributed_timeout_minutes num_workers exit_interval exit_duration_in_mins dry_run".split()
)


def dests_of(by: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """The arguments that ``--by BY`` stands for: names joined by commas, ``router`` for its type and its own arguments.

    Raises:
        UsageError: a name that no run has.
    """
    found: list[str] = []
    for name in by.split(","):
        dest = name.strip().removeprefix("--").replace("-", "_")
        if dest == ROUTER:
            found += router_dests()
        elif any(dest in run.arguments for run in runs):
            found.append(dest)
        else:
            raise UsageError(f"--by {name}: no run has such an argument (router, or Megatron's name, as lr)")
    return tuple(dict.fromkeys(found))


def dests_of_options(options: Iterable[str], runs: Sequence[Run]) -> tuple[str, ...]:
    """The arguments behind ``options``; any of a router's brings all of them along, as its type decides the others."""
    names = [option.removeprefix("--").removeprefix("no-").replace("-", "_") for option in options]
    of_router = router_dests() if set(names) & set(router_dests()) else ()
    return tuple(dict.fromkeys((*of_router, *(name for name in names if any(name in run.arguments for run in runs)))))


def router_dests() -> tuple[str, ...]:
    """The router's type and what the registry's types let a user choose."""
    return _TYPE, *dict.fromkeys(argument.dest for argument in (*all_arguments(), RECURRENCE, RESIDUAL))


def differing(runs: Sequence[Run]) -> tuple[str, ...]:
    """Arguments of different values in ``runs``, that may matter."""
    dests = dict.fromkeys(dest for run in runs for dest in run.arguments)
    return tuple(d for d in dests if d not in _IMMATERIAL and len({_value(run, d) for run in runs}) > 1)


def grouped(runs: Sequence[Run], dests: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by label, in the order of the seeds; labels name what differs among the groups, and nothing else.

    Raises:
        UsageError: two runs of a group with the same seed.
    """
    by_values: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_values.setdefault(tuple(_value(run, dest) for dest in dests), []).append(run)
    firsts = [group[0] for group in by_values.values()]
    varied = [dest for dest in dests if len({_value(run, dest) for run in firsts}) > 1]
    result = {}
    for group in by_values.values():
        label = _label(group[0], varied, firsts)
        seeds = [run.seed for run in group]
        if twice := [run for run in group if seeds.count(run.seed) > 1]:
            others = [dest for dest in differing(twice) if dest not in dests]
            hint = f"; they differ in --{others[0].replace('_', '-')}: add it to --by" if others else ""
            raise UsageError(f"{twice[0].folder} and {twice[1].folder}: both are {label}, seed {twice[0].seed}{hint}")
        if label in result:
            raise UsageError(f"{group[0].folder} and {result[label][0].folder}: differ, but are both called {label}")
        result[label] = group
    return result


def _label(run: Run, varied: Sequence[str], firsts: Sequence[Run]) -> str:
    """As ``gru`` or ``gru, lr 0.001``: of the router's arguments those in which runs of its type differ."""
    words = []
    for dest in varied:
        value = run.arguments.get(dest)
        if dest == _TYPE:
            words.append(str(value))
        elif dest in router_dests() and _TYPE in varied:
            alike = [other for other in firsts if other.arguments.get(_TYPE) == run.arguments.get(_TYPE)]
            if len({_value(other, dest) for other in alike}) > 1:
                words.append(f"{dest.removeprefix('moe_router_').replace('_', '-')} {value}")
        else:
            words.append(f"{dest.replace('_', '-')} {value}")
    return ", ".join(words) or "all runs"


def warnings(groups: dict[str, list[Run]], dests: Sequence[str]) -> list[str]:
    """What a reader must know: other differences, other data or lengths, single seeds, unpaired seeds."""
    runs = [run for group in groups.values() for run in group]
    told = []
    for dest in differing(runs):
        if dest not in dests and (dest not in router_dests() or not set(router_dests()) & set(dests)):
            told.append(f"runs also differ in --{dest.replace('_', '-')}: {_values(groups, dest)}")
    for what, of in (
        ("training text", lambda run: run.dataset),
        ("iterations done", lambda run: run.summary["iterations"]),
        ("evaluated tokens", lambda run: run.evaluated),
    ):
        found = {label: sorted({str(of(run)) for run in group}) for label, group in groups.items()}
        if len({value for values in found.values() for value in values}) > 1:
            each = "; ".join(f"{label}: {' and '.join(values)}" for label, values in found.items())
            told.append(f"runs differ in their {what}: {each}")
    if any(f"{split}_bpc_partial" in run.summary for run in runs for split in ("test", "valid")):
        told.append("figures of --eval-tokens runs stand for the first tokens of a split only")
    single = [label for label, group in groups.items() if len(group) == 1]
    if single:
        told.append(f"one seed only: {'; '.join(single)}. Seeds differ, often by more than settings do")
    seeds = {label: {run.seed for run in group} for label, group in groups.items()}
    if len({frozenset(one) for one in seeds.values()}) > 1:
        each = "; ".join(f"{label}: {', '.join(map(str, sorted(one)))}" for label, one in seeds.items())
        told.append(f"not every seed is there for all ({each}): differences are those of the common seeds")
    return told


def _values(groups: dict[str, list[Run]], dest: str) -> str:
    each = {label: sorted({_value(run, dest) for run in group}) for label, group in groups.items()}
    return "; ".join(f"{label}: {' and '.join(values)}" for label, values in each.items())


def _value(run: Run, dest: str) -> str:
    return json.dumps(run.arguments.get(dest), sort_keys=True, default=str)
