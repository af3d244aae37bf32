"""Runs cases, all of one number of processes in one process group, and keeps what every rank recorded."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.distributed.cases import Case, model

REPOSITORY = Path(__file__).parents[2]
START = "start of "


def torchrun(processes: int, log: Path, *words: str, timeout: int = 600) -> None:
    """Runs a module under torchrun; everything it started ends with it, and its output is in ``log``."""
    with _started(processes, log, *words) as process:
        code = process.wait(timeout=timeout)
    assert code == 0, log.read_text()[-6000:]


@contextlib.contextmanager
def _started(processes: int, log: Path, *words: str):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron wants it with tensor and context parallelism
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--nproc-per-node", str(processes), *words],
            env=environment,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Lab:
    """Results of cases by name: one dictionary a rank, see :class:`tests.distributed.worker.Recorder`.

    Cases of the same shape start from the same weights, written by one process and loaded by every layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[dict]] = {}
        self._batches = 0

    def run(self, cases: Iterable[Case]) -> None:
        """Runs those that have not run, the starts of their shapes first."""
        todo = [case for case in cases if case.name not in self.results]
        shapes = dict.fromkeys(case.shape for case in todo if case.from_start)
        starts = [self._start(shape) for shape in shapes]
        self._run_all([start for start in starts if start.name not in self.results])
        self._run_all(todo)

    def deviation(self, name: str, reference: str, first: int = 0) -> float:
        """Largest relative difference of losses and gradient norms, from iteration ``first`` of the reference on."""
        one, other = self.results[reference][0], self.results[name][0]
        pairs = []
        for key in ("loss", "grad_norm"):
            expected = one[key][first:]
            assert len(expected) == len(other[key]) > 0, (name, len(expected), len(other[key]))
            pairs += zip(expected, other[key], strict=True)
        return max(abs(b / a - 1) for a, b in pairs)

    def _start(self, shape: str) -> Case:
        argv = ["--train-iters", "1", "--lr", "0", "--min-lr", "0", "--save", str(self.folder / (START + shape))]
        return Case(START + shape, 1, shape, tuple(argv), from_start=False)

    def _run_all(self, cases: list[Case]) -> None:
        for processes in sorted({case.processes for case in cases}):
            group = [case for case in cases if case.processes == processes]
            # runs of one process leave a processor idle: two groups of them side by side
            halves = [group[::2], group[1::2]] if processes == 1 else [group]
            self._run_groups(processes, [half for half in halves if half])

    def _run_groups(self, processes: int, groups: list[list[Case]]) -> None:
        with contextlib.ExitStack() as stack:
            running = []
            for group in groups:
                self._batches += 1
                file = self.folder / f"cases{self._batches}.json"
                file.write_text(json.dumps([self._described(case) for case in group]))
                log = self.folder / f"log{self._batches}"
                words = ("-m", "tests.distributed.worker", str(file), str(self.folder))
                running.append((stack.enter_context(_started(processes, log, *words)), log))
            for process, log in running:
                code = process.wait(timeout=900)
                assert code == 0, log.read_text()[-6000:]
        for case in (case for group in groups for case in group):
            files = [self.folder / f"{file_name(case.name)}.{rank}.pt" for rank in range(processes)]
            self.results[case.name] = [torch.load(file, weights_only=False) for file in files]

    def _described(self, case: Case) -> dict:
        argv = [word.replace("{folder}", str(self.folder)) for word in (*model(case.shape), *case.argv)]
        argv += ["--runs-dir", str(self.folder / "runs")]
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
