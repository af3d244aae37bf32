"""Tasks of lm-evaluation-harness: its stock definitions, on the stock sets or on rows of files."""

from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pyarrow
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.tasks.known import TASKS
from rmoe_megablocks.evaluation.tasks.rows import Local, Row


def manager() -> TaskManager:
    """Knows the stock definitions of our tasks alone: to read all of the harness's takes minutes."""
    stock = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_defaults=False, include_path=[stock / known.folder for known in TASKS.values()])


def of_hub(knowing: TaskManager, task: str) -> Task:
    """The stock task with its stock set, downloaded unless it is in the cache. Raises UsageError where it cannot be."""
    try:
        return knowing.load(task)["tasks"][task]
    except Exception as error:  # of the network, the hub, the cache: each library has its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UsageError(
            f"the stock set of {task} could not be loaded ({said}): --data-dir takes rows of files"
        ) from error


def of_rows(knowing: TaskManager, local: Local) -> Task:
    """The stock task in all but where its rows come from and, as they have it, of which split they are.

    Rows of HellaSwag that its definition has prepared already (query, choices, gold) are not prepared again.
    """
    known = TASKS[local.task]
    splits = {local.split: _dataset(local.path, local.rows)}
    files = {local.split: str(local.path)}
    if local.examples:
        splits[known.examples] = _dataset(local.examples_path, local.examples)
        files[known.examples] = str(local.examples_path)
    override: dict[str, Any] = {
        "task": local.task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        # rather than load_dataset of these: the rows have been read and checked, and it guesses at types, as of dates
        "custom_dataset": lambda **_: datasets.DatasetDict(splits),
        "training_split": known.examples if local.examples else None,
        "validation_split": "validation" if local.split == "validation" else None,
        "test_split": "test" if local.split == "test" else None,
    }
    if local.prepared:
        override |= {"process_docs": None, "doc_to_target": "gold"}
    # a group is how the harness takes overrides of a definition
    task = knowing.load({"group": "local", "task": [override]})["tasks"][local.task]
    task.set_config("custom_dataset", None)  # the result would have this function's text
    return task


def _dataset(path: Path, rows: tuple[Row, ...]) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(list(rows))
    except pyarrow.ArrowException as error:  # of what is checked the types are right
        said = str(error).splitlines()[0][:200]
        raise UsageError(f"{path}: a field that the task does not read is of different types ({said})") from error
