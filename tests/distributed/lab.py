"""Runs cases, all of one number of processes in one process group, and keeps what every rank recorded."""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from tests import forked
from tests.distributed.cases import Case, model

START = "start of "


def run_groups(folder: Path, rounds: list[list[tuple[int, list[dict]]]]) -> dict[str, list[dict]]:
    """Runs rounds of groups (processes, described cases), the groups of a round side by side.

    Returns the result of every rank by the case's name, see worker.py. The files lie in ``folder``.
    """
    results, number = {}, itertools.count(len(list(folder.glob("cases*.json"))))
    for groups in rounds:
        _run_side_by_side(folder, groups, number)
        for processes, cases in groups:
            for case in cases:
                files = (folder / f"{case['name']}.{rank}.pt" for rank in range(processes))
                results[case["name"]] = [torch.load(file, weights_only=False) for file in files]
    return results


def _run_side_by_side(folder: Path, groups: list[tuple[int, list[dict]]], number: Iterator[int]) -> None:
    with contextlib.ExitStack() as stack:
        running = []
        for processes, cases in groups:
            this = next(number)
            file, log = folder / f"cases{this}.json", folder / f"log{this}"
            file.write_text(json.dumps(cases))
            arguments = (str(file), str(folder))
            ranks = forked.ranks("tests.distributed.worker:main", arguments, processes, log)
            running.append((stack.enter_context(ranks), log, 120 + 20 * len(cases)))
        for ranks, log, limit in running:
            codes = forked.end(ranks, limit)
            assert not any(code != 0 for code in codes), f"{codes} after at most {limit} s: {log.read_text()[-6000:]}"


def deviation(reference: dict, other: dict, first: int = 0) -> float:
    """Largest relative difference of two losses and gradient norms, from iteration ``first`` of the reference on."""
    pairs = []
    for key in ("loss", "grad_norm"):
        expected = reference[key][first:]
        assert len(expected) == len(other[key]) > 0
        pairs += zip(expected, other[key], strict=True)
    assert all(math.isfinite(value) for pair in pairs for value in pair)  # a maximum may pass over a NaN
    return max(abs(b / a - 1) for a, b in pairs)


class Lab:
    """Results of cases by name: one dictionary a rank, see :class:`tests.distributed.worker.Recorder`.

    Cases of the same shape start from the same weights, written by one process and loaded by every layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[dict]] = {}

    def run(self, cases: Iterable[Case]) -> None:
        """Runs those that have not run, the starts of their shapes first."""
        todo = [case for case in cases if case.name not in self.results]
        shapes = dict.fromkeys(case.shape for case in todo if case.from_start)
        starts = [self._start(shape) for shape in shapes]
        rounds = self._rounds([start for start in starts if start.name not in self.results]) + self._rounds(todo)
        results = run_groups(self.folder, rounds)
        self.results |= {
            case.name: results[file_name(case.name)] for case in [*starts, *todo] if file_name(case.name) in results
        }

    def deviation(self, name: str, reference: str, first: int = 0) -> float:
        """Of two cases, see :func:`deviation`."""
        return deviation(self.results[reference][0], self.results[name][0], first)

    def _start(self, shape: str) -> Case:
        argv = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(self.folder / (START + shape))]
        return Case(START + shape, 1, shape, tuple(argv), collect=("weights",), from_start=False)

    def _rounds(self, cases: list[Case]) -> list[list[tuple[int, list[dict]]]]:
        rounds = []
        for processes in sorted({case.processes for case in cases}):
            group = [self._described(case) for case in cases if case.processes == processes]
            if processes == 1:  # leaves a processor idle: two groups side by side
                rounds.append([(1, half) for half in (group[::2], group[1::2]) if half])
            else:
                rounds.append([(processes, group)])
        return rounds

    def _described(self, case: Case) -> dict:
        argv = [word.replace("{folder}", str(self.folder)) for word in (*model(case.shape), *case.argv)]
        argv += ["--runs-dir", str(self.folder / "runs"), "--data-cache-path", str(self.folder / "data_cache")]
        argv += ["--run-name", file_name(case.name)]
        if "--save" not in argv and "--no-checkpoints" not in argv:
            argv.append("--no-checkpoints")
        if case.from_start:
            start = str(self.folder / (START + case.shape))
            argv += ["--load", start, "--finetune", "--no-load-optim", "--no-load-rng"]
        return dataclasses.asdict(case) | {"name": file_name(case.name), "argv": argv, "break": case.fault}


def file_name(name: str) -> str:
    """``name`` fit for a file."""
    return name.replace("/", " ").replace("|", "_")
