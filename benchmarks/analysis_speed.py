"""How fast the measures of ``rmoe analyze`` stream over recorded routing, and how much memory they take.

A recording of the size asked for is simulated a batch at a time, so that no disk bounds it: scores of layers that know
nothing of each other, which makes nearly every path of experts a new one, and token ids as frequent as in a text. What
making a batch takes is left out of the time. With ``--folder`` the recording is written there first, and measured from
the disk, reading included; it stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks import machine
from benchmarks.measuring.command_line import at_least
from rmoe_megablocks.analysis import measuring
from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.errors import UsageError

_BATCH = 65_536
_VOCABULARY = 50_000
_COLUMNS = ("margin", "state_norm", "update_gate", "reset_gate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=at_least(1), default=200_000, help="of the simulated recording (default 200000)")
    add("--layers", type=at_least(1), default=24, help="MoE layers (default 24)")
    add("--experts", type=at_least(2), default=16, help="of a layer (default 16)")
    add("--topk", type=at_least(1), default=4, help="experts a token (default 4)")
    add("--information-tokens", type=at_least(0), default=0, help="of the mutual information; 0: all (default 0)")
    add("--seed", type=at_least(0), default=0)
    add("--folder", type=Path, help="write the recording to this new folder and measure it from there")


class Simulated:
    """What a recording offers, made as it is read.

    One batch of scores is drawn; every batch has each layer's in another order, so that what layers have in common is
    chance, and paths differ from batch to batch.

    Attributes:
        seconds, processor_seconds: spent on making batches.
    """

    def __init__(self, tokens: int, layers: int, experts: int, topk: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.about = About(
            name=f"simulated-{tokens}", model="simulated", layers=list(range(1, layers + 1)), experts=experts,
            topk=topk, tokens=tokens, router_type="gru", recurrent=True, seq_length=4096,
        )  # fmt: skip
        self.weights: dict[str, np.ndarray] = {}
        self._seed, self._rows = seed, min(_BATCH, tokens)
        logits = generator.standard_normal((layers, self._rows, experts), np.float32)
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        self._scores_LTE = (logits / logits.sum(-1, keepdims=True)).astype(np.float16)
        self._choices_LTK = np.argsort(-self._scores_LTE, axis=-1)[..., :topk].astype(np.int16)
        self._columns = {f"{name}_TL": generator.random((self._rows, layers), np.float32) for name in _COLUMNS}
        self.seconds = self.processor_seconds = 0.0

    def batches(self, columns=None):
        """Batches of 65536 tokens; of few columns, scores and the rest are not made."""
        for start in range(0, self.about.tokens, self._rows):
            wall, processor = time.perf_counter(), time.process_time()
            batch = self._batch(start, columns)
            self.seconds += time.perf_counter() - wall
            self.processor_seconds += time.process_time() - processor
            yield batch

    def _batch(self, start: int, columns) -> SimpleNamespace:
        generator = np.random.default_rng((self._seed, start))
        rows = min(self._rows, self.about.tokens - start)
        ids = _VOCABULARY ** generator.random(rows)  # a Zipf distribution: the n-th most frequent has about 1 / n
        place = np.arange(start, start + rows)
        found = {
            "token_T": ids.astype(np.int32),
            "next_token_T": np.append(ids[1:], 0).astype(np.int32),
            "predicted_T": generator.permutation(ids).astype(np.int32),
            "position_T": place % 4096,
            "window_T": place // 4096,
            "domain_T": np.where(place // 4096 % 4 == 0, "code", "prose"),
        }
        if columns is None or "choices" in columns:
            order = generator.integers(self._rows, size=len(self.about.layers))
            found["choices_TLK"] = self._turned(self._choices_LTK, order, rows)
            if columns is None:
                found["scores_TLE"] = self._turned(self._scores_LTE, order, rows)
                found |= {name: values[:rows] for name, values in self._columns.items()}
        return SimpleNamespace(**found)

    def _turned(self, values_LTX: np.ndarray, order_L: np.ndarray, rows: int) -> np.ndarray:
        result = np.empty((rows, len(values_LTX), values_LTX.shape[2]), values_LTX.dtype)
        for layer, shift in enumerate(order_L):
            result[:, layer] = np.roll(values_LTX[layer], shift, axis=0)[:rows]
        return result


def run(args: argparse.Namespace) -> str:
    """The table: seconds of measuring, token-layers a second, peak memory of the process."""
    if args.topk > args.experts:
        raise UsageError(f"--topk {args.topk}: there are {args.experts} experts")
    recording = Simulated(args.tokens, args.layers, args.experts, args.topk, args.seed)
    where = "making batches left out"
    if args.folder:
        recording, where = _written(recording, args.folder), "read from disk, reading included"
    before = _peak()
    wall, processor = time.perf_counter(), time.process_time()
    found = measuring.measure(recording, measuring.Options(information_tokens=args.information_tokens))
    wall = time.perf_counter() - wall - getattr(recording, "seconds", 0)
    processor = time.process_time() - processor - getattr(recording, "processor_seconds", 0)
    peak = _peak()
    work = args.tokens * args.layers
    of = f"{found['measures']['mutual_information']['tokens']:,} tokens in the mutual information"
    return "\n".join(
        [
            f"{machine.describe()}; {machine.load()}",
            f"simulated recording: {args.layers} layers, {args.experts} experts, top-{args.topk}; {of};",
            f"every measure with baselines and 1000 resamples; one process; {where}",
            "",
            "| tokens | s | token-layers/s | processor s | token-layers a processor s | peak MiB | before measuring |",
            "|---|---|---|---|---|---|---|",
            f"| {args.tokens:,} | {wall:.1f} | {work / wall:,.0f} | {processor:.1f} | {work / processor:,.0f} | "
            f"{peak:,.0f} | {before:,.0f} |",
        ]
    )


def _written(recording: Simulated, folder: Path):
    """The recording as it is read from ``folder``, which must be new."""
    from rmoe_megablocks.analysis.recording.reading import Recording
    from rmoe_megablocks.analysis.recording.writing import Writer

    about = dataclasses.replace(recording.about, tokens=0)
    with Writer(folder, about) as writer:
        for batch in recording.batches():
            writer.write(**vars(batch))
        writer.finish()
    return Recording.open(folder)


def _peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
