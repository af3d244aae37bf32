"""Which measured recordings are seeds of one setting, and what a comparison of them can say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rmoe_megablocks.errors import UsageError

#: of a configuration: what does not make another setting, as names, places and the seed
_IMMATERIAL = frozenset(
    "seed name_or_path _name_or_path run_name runs_dir save load tensorboard_dir wandb_save_dir wandb_exp_name "
    "wandb_project data_cache_path transformers_version architectures dtype torch_dtype".split()
)

Measured = Mapping[str, Any]


def grouped(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """By label, in the order given: recordings of one router, configuration and iteration are one group, where each has
    a seed of its own; what has no seed is a group by itself. A label is the router's type, or a recording's name where
    two groups have the same type.

    Raises:
        UsageError: fewer than two recordings, or two of one name.
    """
    if len(measured) < 2:
        raise UsageError("compare: needs two measured recordings or more")
    names = [_about(one)["name"] for one in measured]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"compare: two recordings are named {twice}: give one another name")
    found: dict[tuple, list[Measured]] = {}
    for one in measured:
        about = _about(one)
        key: tuple = (_setting(about),)
        if about.get("seed") is None or any(_about(other)["seed"] == about["seed"] for other in found.get(key, ())):
            key = (*key, about["name"])
        found.setdefault(key, []).append(one)
    types = [_about(group[0])["router_type"] for group in found.values()]
    return {
        kind if types.count(kind) == 1 else _about(group[0])["name"]: group
        for kind, group in zip(types, found.values(), strict=True)
    }


def seed(one: Measured) -> int:
    """Of the run; of a group of several recordings all have one."""
    return _about(one)["seed"]


def _about(one: Measured) -> Mapping[str, Any]:
    return one["recording"]


def _setting(about: Mapping[str, Any]) -> str:
    config = {key: value for key, value in (about.get("config") or {}).items() if key not in _IMMATERIAL}
    return json.dumps([about["router_type"], about.get("iteration"), config], sort_keys=True, default=str)


def same_text(measured: Sequence[Measured]) -> bool:
    """Whether all were recorded on the same tokens in the same windows, and cut into the same blocks."""
    keys = ("tokens", "seq_length", "tokenizer")
    told = {
        json.dumps(
            [
                [about.get(key) for key in keys],
                [(part.get("label"), part.get("sha256"), part.get("tokens")) for part in about.get("data") or ()],
                one["bootstrap"]["blocks"],
                one["options"]["seed"],
            ],
            sort_keys=True,
            default=str,
        )
        for one in measured
        for about in (_about(one),)
    }
    return len(told) == 1


def warnings(groups: Mapping[str, Sequence[Measured]], is_paired: bool) -> list[str]:
    """One line for each thing that makes figures of two groups something else than a comparison of routers."""
    everything = [one for group in groups.values() for one in group]
    told = []
    if not is_paired:
        told.append("the recordings are of different texts, so figures differ by what was read too")
    for key, why in {
        "experts": "nearly every figure depends on it",
        "topk": "loads, coactivation and specialisation depend on it",
        "layers": "means are over other layers",
        "score_function": "sigmoid scores are no distribution until divided by their sum",
        "iteration": "the models were trained for different times",
    }.items():
        values = dict.fromkeys(json.dumps(_about(one).get(key)) for one in everything)
        if len(values) > 1:
            told.append(f"{key} differs ({', '.join(map(_short, values))}): {why}")
    if len({one["tokens"] for one in everything}) > 1:
        told.append("recordings have different numbers of tokens, with which path entropy and chance levels change")
    for name in ("information_tokens", "batch_tokens", "path_tokens"):
        if len({one["options"][name] for one in everything}) > 1:
            told.append(f"measured with different {name.replace('_', ' ')}: measure all alike")
    return told


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:17]}..."
