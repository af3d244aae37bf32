"""What comes of tasks: the harness's JSON, a table of 80 columns, and the mean over the tasks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import unweighted_mean_stderr
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import handle_non_serializable, hash_string

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.report import wrapped
from rmoe_megablocks.evaluation.tasks.known import TASKS
from rmoe_megablocks.evaluation.tasks.model import Model
from rmoe_megablocks.evaluation.tasks.rows import Local

_FILTER = "none"  # the harness's name for answers taken as they are


def complete(found: dict[str, Any], tracker: EvaluationTracker) -> None:
    """Adds what the harness's own command adds before it writes: checksums of rows and requests, the model's names.

    The samples themselves, which its command writes if asked to, are taken out.
    """
    samples = found.pop("samples")
    keys = ("doc_hash", "prompt_hash", "target_hash")
    found["task_hashes"] = {
        task: hash_string("".join(row[key] for row in rows for key in keys)) for task, rows in samples.items()
    }
    tracker.general_config_tracker.log_end_time()
    found |= dataclasses.asdict(tracker.general_config_tracker)


def summary(found: dict[str, Any], scorer: Model, local: dict[str, Local], names: list[str]) -> dict[str, Any]:
    """Ours beside the harness's: the mean with its standard error, which metric of a task is in it, and notes."""
    metrics = {name: TASKS[name].averaged for name in names}
    values = [found["results"][name][f"{metric},{_FILTER}"] for name, metric in metrics.items()]
    errors = [found["results"][name][f"{metric}_stderr,{_FILTER}"] for name, metric in metrics.items()]
    return {
        "averaged": metrics,
        "mean": sum(values) / len(values),
        "mean_stderr": float(unweighted_mean_stderr(errors)),
        "partial": any(count["effective"] < count["original"] for count in found["n-samples"].values()),
        "cut_requests": dict(scorer.cut),
        "unknown_requests": dict(scorer.unknown),
        "notes": _notes(scorer, local, names),
    }


def _notes(scorer: Model, local: dict[str, Local], names: list[str]) -> list[str]:
    notes = [local[name].note for name in names if name in local and local[name].note]
    for name in names:
        if scorer.cut[name]:
            notes.append(
                f"{name}: {scorer.cut[name]:,} requests are longer than the model's {scorer.max_length:,} positions: "
                "their beginning is cut"
            )
        if scorer.unknown[name]:
            notes.append(f"{name}: {scorer.unknown[name]:,} requests have tokens that the tokenizer does not know")
    return notes


def table(model: str, found: dict[str, Any]) -> str:
    """Lines of at most 80 columns, each value with its standard error; what is partial says so first."""
    ours, config = found["rmoe"], found["config"]
    shots = max(found["n-shot"].values())
    lines = [f"{model}, {shots}-shot, lm-eval {found['lm_eval_version']}"]
    if ours["partial"]:
        lines.append(f"PARTIAL (--limit): the first {config['limit']:,} rows of each task alone")
    lines.append(f"  {'task':<14}  {'metric':<10}  {'value':>11}  {'stderr':>11}  {'rows':>6}")
    for name, averaged in ours["averaged"].items():
        rows, label = found["n-samples"][name]["effective"], name
        for metric in (entry["metric"] for entry in found["configs"][name]["metric_list"]):
            value, error = (found["results"][name][f"{metric}{kind},{_FILTER}"] for kind in ("", "_stderr"))
            mark = " *" if metric == averaged else ""
            lines.append(f"  {label:<14}  {metric:<10}  {_number(value):>11}  {_number(error):>11}  {rows:>6,}{mark}")
            label = ""
    if (count := len(ours["averaged"])) > 1:
        lines.append(
            f"  {'mean of the *':<14}  {f'{count} tasks':<10}  {_number(ours['mean']):>11}  "
            f"{_number(ours['mean_stderr']):>11}"
        )
    lines.append(f"  computed in {_dtype(config)} on {config['device']}, batches of {config['batch_size']}")
    return "\n".join(part for line in [*lines, *ours["notes"]] for part in wrapped(line))


def _dtype(config: dict[str, Any]) -> str:
    return str(config["model_dtype"]).removeprefix("torch.")


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 1e5 else f"{value:.4g}"


def write(found: dict[str, Any], path: Path) -> None:
    """Writes the result as the harness does. Raises UsageError."""
    text = json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written ({error.strerror})") from error
