"""metrics.jsonl, the curves of a run: one JSON object a line, in the order in which things happened.

``kind`` says what a line is:

``train``
    One iteration. ``iteration`` (from 1; none for those of --iterations-to-skip), ``lm_loss`` (nats a token, mean over
    the global batch), ``bpc`` (the same in bits per byte of text, where the bytes are known), ``grad_norm``,
    ``learning_rate``, ``skipped`` (the optimizer took no step, as fp16 overflowed), ``tokens`` (of this iteration's
    own global batch), ``seconds`` (since the last iteration, checkpoints included and evaluations not),
    ``tokens_per_second``; in the first iteration and every --log-interval ``routing``, lists with a figure for each
    MoE layer, see :meth:`.health.RoutingHealth.report`: of it, under --cuda-graph-impl full_iteration of all
    since the last line that has them.
``valid``, ``test``
    Loss of --eval-iters batches drawn from that split after ``iteration``: ``lm_loss``, ``bpc``, ``tokens`` (those
    evaluated), ``trained_tokens`` (so far, by the lines above), ``seconds``; ``set``, the name or number of one of
    several.
    ``test`` is there only where no exact evaluation follows, whose results are in summary.json.
``stopped``
    The last line of a session that could not go on: ``iteration`` was not finished, ``stopped`` says why.

A figure that is not finite is null here, since JSON has no word for it, and ``not_finite`` lists its name. A resumed
run drops the lines of the iterations that it does again, and a summary.json that counts them.
"""

import json
import math
import sys
from pathlib import Path

from rmoe_megablocks.megatron.checkpoints.files import write_atomically
from rmoe_megablocks.megatron.checkpoints.storage import naming


class Metrics:
    """The file, for the one rank that writes it.

    Attributes:
        trained_tokens: of all iterations in the file, those of earlier sessions included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trained_tokens = 0

    def resume(self, iteration: int) -> None:
        """Drops the lines of ``iteration``, which is done next, and of later ones."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _iteration(line) < iteration]
            write_atomically(self.path, "".join(line + "\n" for line in kept))
        self.trained_tokens = self.totals(iteration - 1)["tokens"]
        summary = self.path.with_name("summary.json")
        if summary.exists() and _iteration(summary.read_text(), "iterations") >= iteration:
            summary.unlink()

    def add(self, kind: str, record: dict) -> None:
        """Appends a line of :mod:`this format <.metrics>`."""
        line = {"kind": kind} | {name: _finite(value) for name, value in record.items()}
        bad = [name for name, value in record.items() if repr(line[name]) != repr(value)]
        line |= {"not_finite": bad} if bad else {}
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if kind == "train":
            self.trained_tokens += record["tokens"]

    def totals(self, iteration: int) -> dict:
        """Seconds and tokens of the iterations up to ``iteration``, over all sessions of the run."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [json.loads(line) for line in lines if _iteration(line) <= iteration]
        trained = [record for record in records if record.get("kind", "train") == "train"]  # once lines had no kind
        return {key: sum(record.get(key) or 0 for record in trained) for key in ("seconds", "tokens")}


def _iteration(line: str, key: str = "iteration") -> int:
    try:
        return json.loads(line)[key]
    except (ValueError, KeyError):  # the last line of a killed process may be cut
        return sys.maxsize


def _finite(value):
    """``value`` with null for what JSON cannot say, in lists and dictionaries as well."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
