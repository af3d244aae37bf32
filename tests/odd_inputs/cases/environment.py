"""Odd surroundings: folders, locales, variables, a second start."""

import json

from tests.odd_inputs.case import Case

TINY = "pretrain --config {repository}/configs/tiny.yaml"
SMALL = "--num-layers 2 --hidden-size 16 --ffn-hidden-size 16 --moe-ffn-hidden-size 16 --num-attention-heads 2"
ONE = "--pipeline-model-parallel-size 1 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1"
SHORT = f"{SMALL} {ONE} --global-batch-size 2 --train-iters 2 --eval-iters 1 --no-final-evaluation"


def would_start(outcome):
    assert "would start" in outcome.out, outcome.out + outcome.err


def trained(outcome):
    """Two iterations, one line each, and a summary that says so."""
    (summary,) = outcome.folder.rglob("summary.json")
    assert json.loads(summary.read_text())["iterations"] == 2
    lines = [json.loads(line) for line in (summary.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "grad_norm" in line] == [1, 2]


CASES = [
    Case("a folder whose name has a space", f"{TINY} --runs-dir 'my runs'", works=would_start),
    Case("a runs folder that is a file", f"{TINY} --runs-dir file", files={"file": ""}, refused="--runs-dir.*file"),
    Case("the C locale", f"{TINY} {SHORT}", env={"LC_ALL": "C"}, trains=True, works=trained, seconds=120),
    Case("no home folder", f"{TINY}", env={"HOME": None}, works=would_start),
    Case("OMP_NUM_THREADS is not a number", f"{TINY}", env={"OMP_NUM_THREADS": "many"}, works=would_start),
]
