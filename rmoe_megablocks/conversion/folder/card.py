"""README.md of an exported model: what it is, how it was trained, its curves, its results, how exact the export is."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks import __version__

_POINTS = 12
_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- rmoe
- moe
---

"""
_USE = """```python
from transformers import AutoModelForCausalLM

import rmoe_megablocks.huggingface  # registers the model type

model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""


@dataclass(frozen=True)
class Facts:
    """What the card tells.

    Attributes:
        name: of the model.
        config: config.json.
        parameters: number of them.
        iteration: of the checkpoint.
        run: the run's folder with metrics.jsonl, config.yaml and summary.json, None if it is not there.
        difference: the measured difference of logits in words, None if it was not measured.
        left_out: tensors that the checkpoint has and the folder has not.
        tokenizer: its kind.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int
    iteration: int
    run: Path | None
    difference: str | None
    left_out: Sequence[str]
    tokenizer: str


def text(facts: Facts) -> str:
    """The card."""
    config = facts.config
    experts = f"{config['num_experts']} experts, {config['num_experts_per_tok']} of them for a token"
    parts = [
        _HEADER + f"# {facts.name}\n",
        f"A mixture-of-experts language model with the router `{config['router_type']}`: {facts.parameters:,} "
        f"parameters, {config['num_hidden_layers']} layers of width {config['hidden_size']}, {experts}, "
        f"{config['vocab_size']:,} tokens in its vocabulary. Iteration {facts.iteration:,} of its training, exported "
        f"by rmoe-megablocks {__version__}.\n",
        _USE,
    ]
    if facts.tokenizer == "bytes":
        parts.append(
            "Token ids are bytes. Text goes through the tokenizer; any bytes, valid UTF-8 or not, are `list(data)`, "
            "and `bytes(ids)` gives them back.\n"
        )
    parts.append("## Exactness\n\n" + (facts.difference or "Logits were not compared with Megatron's.") + "\n")
    if facts.left_out:
        parts.append(
            "The checkpoint's multi-token-prediction layers are not in this folder: "
            + ", ".join(f"`{name}`" for name in facts.left_out)
            + ".\n"
        )
    parts += _of_run(facts.run) if facts.run else ["## Training\n\nThe run's folder was not there at the export.\n"]
    return "\n".join(parts)


def _of_run(run: Path) -> list[str]:
    parts = []
    curve = _curve(run / "metrics.jsonl")
    if curve:
        rows = [f"| {step} | {train} | {valid} |" for step, train, valid in curve]
        parts.append(
            "## Curves\n\n| iteration | training loss | validation loss |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    results = _read_json(run / "summary.json")
    if results:
        rows = [f"| {key} | {value} |" for key, value in _flat(results)]
        parts.append("## Results\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    try:
        lines = (run / "config.yaml").read_text().splitlines()
    except OSError:
        return parts
    kept = [line for line in lines if not re.search(r":\s+['\"]?/", line)]  # somebody's folders tell nobody anything
    return [*parts, "## Configuration\n\n```yaml\n" + "\n".join(kept) + "\n```\n"]


def _curve(path: Path) -> list[tuple[int, str, str]]:
    """(iteration, training loss, validation loss) at about a dozen iterations, both ends among them."""
    train: dict[int, float] = {}
    valid: dict[int, float] = {}
    try:
        for line in path.read_text().splitlines():
            point = json.loads(line)
            if isinstance(point.get("lm_loss"), int | float) and math.isfinite(point["lm_loss"]):
                {"train": train, "valid": valid}.get(point.get("kind"), {})[point["iteration"]] = point["lm_loss"]
    except (OSError, ValueError, KeyError):
        return []
    steps = sorted(train.keys() | valid.keys())
    every = max(1, math.ceil(len(steps) / _POINTS))
    shown = sorted({*steps[::every], *valid, *steps[-1:]} if len(valid) <= _POINTS else {*steps[::every], *steps[-1:]})
    return [(step, _shown(train.get(step)), _shown(valid.get(step))) for step in shown]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            found.append((prefix + key, value))
    return found
