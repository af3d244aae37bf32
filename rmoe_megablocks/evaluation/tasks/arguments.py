"""Which options of ``rmoe eval`` belong to ``--tasks``, and what is refused beside what."""

import argparse
from pathlib import Path

from rmoe_megablocks.errors import UsageError

_OF_TASKS = ("data_dir", "num_fewshot", "batch_size", "limit", "out")
_OF_TEXTS = ("data", "split", "seq_length", "stride", "eval_tokens", "json", "micro_batch_size", "tokenizer_model")
_INSTEAD = {"json": "--out", "micro_batch_size": "--batch-size", "eval_tokens": "--limit", "data": "--data-dir"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of tasks to the parser of ``rmoe eval``."""
    add = parser.add_argument_group(
        "tasks, in the place of a text",
        "Accuracies of lm-evaluation-harness, by its own code and its stock definitions, of a Hugging Face folder. "
        "Beside these --dtype (default: as the folder is stored), --device, --trust-remote-code, --trust-router-code.",
    ).add_argument
    add("--tasks", metavar="A,B", help="some of arc_easy,hellaswag,piqa,sciq,lambada_openai")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="rows from TASK_SPLIT.jsonl there, as piqa_validation.jsonl, and no network (default: the stock sets, "
        "downloaded)",
    )
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="answered examples before each question, of the set's split train (default: 0)",
    )
    add("--batch-size", type=int, metavar="N", help="requests at once (default: 8)")
    add("--limit", type=int, metavar="N", help="the first N rows of each task alone; the result says so")
    add("--out", type=Path, metavar="FILE", help="write the result there, too: JSON as the harness writes it")


def check(args: argparse.Namespace) -> None:
    """Raises UsageError, which names the option, for those of tasks and of texts that do not go together."""
    if args.tasks is None:
        for name in _OF_TASKS:
            if getattr(args, name) is not None:
                raise UsageError(f"{_option(name)} belongs to --tasks, which is not given")
        if args.data is None:
            raise UsageError("nothing to evaluate on: name a text with --data, or --tasks (see rmoe eval --help)")
        return
    for name in _OF_TEXTS:
        if getattr(args, name) is not None:
            instead = f" (use {_INSTEAD[name]})" if name in _INSTEAD else ""
            raise UsageError(f"{_option(name)} does not go with --tasks{instead}")
    for name, least in (("num_fewshot", 0), ("batch_size", 1), ("limit", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            why = ", a standard error takes two rows" if name == "limit" and value == 1 else ""
            raise UsageError(f"{_option(name)} {value}: expected at least {least}{why}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
