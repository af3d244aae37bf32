"""Evaluations, batch sizes that change, and what a run says of itself."""

import json

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import ONE, SMALL, TINY, would_start

FEW = f"{SMALL} {ONE} --train-iters 6 --eval-iters 1 --eval-interval 2 --no-checkpoints"
STEPS = f"{TINY} {FEW} --global-batch-size=null --step-batch-size-schedule"


def _records(outcome, kind: str) -> list[dict]:
    (path,) = outcome.folder.rglob("metrics.jsonl")
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def counted_as_trained(outcome):
    """Three iterations of 2 sequences of 32 tokens, then of 4: everywhere the same numbers, and partial figures."""
    assert [line["tokens"] for line in _records(outcome, "train")] == [64] * 3 + [128] * 3
    assert [line["trained_tokens"] for line in _records(outcome, "valid")] == [128, 320, 576]
    (path,) = outcome.folder.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert (summary["iterations"], summary["tokens"]) == (6, 576)
    assert summary["evaluation"]["test"] == {"tokens": 100, "of": 49999}
    assert 0 < summary["test_bpc_partial"] < 9 and "test_bpc" not in summary


CASES = [
    Case("--eval-tokens 0", f"{TINY} --eval-tokens 0", refused="--eval-tokens.*at least 1"),
    Case("--eval-tokens below nothing", f"{TINY} --eval-tokens=-5", refused="--eval-tokens.*at least 1"),
    Case("--eval-tokens that is no number", f"{TINY} --eval-tokens 1M", refused="--eval-tokens.*1M"),
    Case("--eval-tokens beyond the split", f"{TINY} --eval-tokens 1000000000", works=would_start),
    Case(
        "--full-validation without several sets", f"{TINY} --full-validation", refused="--full-validation.*add --multi"
    ),
    Case("batches that shrink", f"{STEPS} '0:4 1K:2'", refused="--step-batch-size-schedule.*shrink from 4 to 2"),
    Case(
        "a later batch that the ranks do not divide",
        f"{STEPS} '0:4 1K:6' --micro-batch-size 4",
        refused="6 is no multiple of 4",
    ),
    Case("a batch schedule without a colon", f"{STEPS} 8", refused='--step-batch-size-schedule "8".*THRESHOLD'),
    Case("a batch schedule that begins late", f"{STEPS} 1K:2", refused="--step-batch-size-schedule.*threshold 0"),
    Case("a batch schedule with a word", f"{STEPS} 0:two", refused="--step-batch-size-schedule.*could not convert"),
    Case(
        "a batch schedule beside a batch size",
        f"{TINY} --step-batch-size-schedule 0:16",
        refused="--step-batch-size-schedule and --global-batch-size",
    ),
    Case(
        "a batch schedule counted in samples",
        f"{TINY} --global-batch-size=null --train-iters=null --train-samples 400 --step-batch-size-schedule 0:8,32K:16",
        works=would_start,
    ),
    Case(
        "a batch schedule of a run of iterations",
        f"{STEPS} '0:2 192:4' --eval-tokens 100",
        trains=True,
        works=counted_as_trained,
        seconds=120,
    ),
    Case(
        "a batch below one micro-batch a rank",
        f"{TINY} --global-batch-size 3 --decrease-batch-size-if-needed",
        refused="--global-batch-size 3 is below one micro-batch",
    ),
    Case(
        "a batch that is decreased",
        f"{TINY} --global-batch-size 18 --decrease-batch-size-if-needed",
        works=would_start,
    ),
]
