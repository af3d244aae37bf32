"""Runs that resume with another length, batch or learning rate."""

import json
import math

from tests.odd_inputs.case import Case
from tests.odd_inputs.cases.environment import SHORT, TINY

RUN = f"{TINY} {SHORT} --run-name x"
PEAK, LOW = 2e-3, 2e-4


def rate(iteration, of, peak=PEAK, low=LOW):
    """tiny.yaml's cosine, after its warm-up."""
    return low + (peak - low) * (1 + math.cos(math.pi * (iteration / of - 0.07) / 0.93)) / 2


def learning_rates(outcome):
    lines = (outcome.folder / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    return {line["iteration"]: line["learning_rate"] for line in map(json.loads, lines) if "grad_norm" in line}


def follows(expected):
    """{iteration: learning rate}; Megatron logs that of the iteration to come."""

    def check(outcome):
        rates = learning_rates(outcome)
        assert list(rates) == list(expected), rates
        for iteration, value in expected.items():
            assert math.isclose(rates[iteration], value, rel_tol=1e-6), (iteration, rates, value)
        assert "becomes" in outcome.err, outcome.err

    return check


FIRST = {1: rate(1, 2), 2: LOW}
# two iterations of two windows, then one window an iteration, on a schedule of 12 windows
SMALLER = {iteration: rate(min(4 + iteration - 2, 12), 12, 1e-3) for iteration in range(3, 13)}

CASES = [
    Case(
        "--train-iters of a finished run",
        f"{RUN} && {RUN} --train-iters 6",
        works=follows(FIRST | {iteration: rate(iteration, 6) for iteration in range(3, 7)}),
        trains=True,
        seconds=200,
    ),
    Case(
        "half the batch, another --lr and a longer run with --override-opt_param-scheduler",
        f"{RUN} && {RUN} --train-iters 12 --lr 1e-3 --global-batch-size 1 --override-opt_param-scheduler",
        works=follows(FIRST | SMALLER),
        trains=True,
        seconds=200,
    ),
]
