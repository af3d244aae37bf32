"""The tasks that ``rmoe eval --tasks`` runs, and what is known of their stock sets."""

from dataclasses import dataclass

from rmoe_megablocks.errors import UsageError, nearest


@dataclass(frozen=True)
class Known:
    """A task of lm-evaluation-harness.

    Attributes:
        folder: of its stock definition, below lm_eval/tasks.
        splits: of its stock set that have answers; the first is the one that the stock definition scores.
        rows: of that split on the Hugging Face hub.
        examples: the split that the stock definition draws examples from; None where it has no other than the scored.
        averaged: the metric that stands for the task in the mean of all.
    """

    folder: str
    splits: tuple[str, ...]
    rows: int
    examples: str | None
    averaged: str


#: the five of the paper's table; which metric it means by each is not said there: see docs/evaluation.md
TASKS = {
    "arc_easy": Known("arc", ("test", "validation"), 2376, "train", "acc"),
    "hellaswag": Known("hellaswag", ("validation",), 10042, "train", "acc_norm"),
    "piqa": Known("piqa", ("validation",), 1838, "train", "acc"),
    "sciq": Known("sciq", ("test", "validation"), 1000, "train", "acc"),
    "lambada_openai": Known("lambada", ("test",), 5153, None, "acc"),
}


def names_of(words: str) -> list[str]:
    """The tasks of ``--tasks a,b``. Raises UsageError for a name that is unknown, empty or given twice."""
    names = [name.strip() for name in words.split(",")]
    for number, name in enumerate(names):
        if name not in TASKS:
            raise UsageError(
                f"--tasks {words}: {name!r} is unknown{nearest(name, TASKS)}; expected some of {', '.join(TASKS)}"
            )
        if name in names[:number]:
            raise UsageError(f"--tasks {words}: {name} is named twice")
    return names


def check_examples(names: list[str], shots: int) -> None:
    """Raises UsageError for a task whose only rows are the scored ones: a question might be its own example."""
    for name in names:
        if shots and TASKS[name].examples is None:
            raise UsageError(
                f"--num-fewshot {shots}: {name} has no rows but those that are scored, a question might be its own "
                "example: run it without"
            )
