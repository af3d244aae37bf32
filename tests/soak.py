"""Kills a run of two processes again and again and compares: ``python -m tests.soak --kills 20 --seed 0``.

The run saves every second iteration. Each time it is killed with SIGKILL at a random moment (three quarters of them
uniform over the time it trains and saves, the others over its start), either one of its processes or all at once, and
started again with the same command. In the end every tensor of its last checkpoint, weights and optimizer, must equal
that of a run that nothing disturbed. ``--async`` saves asynchronously. Exit code 0 if all of that holds.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rmoe_megablocks.megatron.checkpoints import files as checkpoint_files
from tests.checkpoints import assert_same_tensors

REPOSITORY = Path(__file__).parents[1]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 32 --num-experts 4 --seq-length 32 "
    "--max-position-embeddings 32 --moe-ffn-hidden-size 32 --moe-router-rnn-hidden-size 16 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 64 --micro-batch-size 2 --global-batch-size 8 --eval-iters 0 "
    "--hidden-dropout 0.1 --attention-dropout 0.1 --log-interval 100 --save-interval 2 --save-retain-interval 20"
).split()
SECONDS_TO_END = 300  # for what is left of a killed run; torchrun gives its workers 30, a loaded machine takes longer


@dataclass
class Kill:
    """One kill: what was killed, what it left, and what the next start said about it."""

    what: str
    during: str
    resumed: str = ""
    leftovers: list[str] = field(default_factory=list)


class Run:
    """The run, its folder and the processes of its present attempt."""

    def __init__(self, runs: Path, name: str, words: list[str]) -> None:
        self.folder = runs / name
        self.checkpoints = self.folder / "checkpoints"
        self._command = [sys.executable, "-m", "rmoe_megablocks.launcher", *MODEL, *words]
        self._command += ["--runs-dir", str(runs), "--run-name", name]
        self._attempts = 0
        self.process: subprocess.Popen | None = None
        self.log = runs / f"{name}.0.log"

    def start(self) -> None:
        self.log = self.folder.parent / f"{self.folder.name}.{self._attempts}.log"
        self._attempts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self) -> None:
        code = self.process.wait(timeout=1200)
        if code:
            raise SystemExit(f"the run ended with {code}:\n{self.log.read_text()[-3000:]}")

    def iterations(self) -> int:
        """Iterations that were done, whether or not a checkpoint has them."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_text().count('{"kind": "train"') if metrics.exists() else 0

    def wait_for_training(self) -> bool:
        """Until this attempt has done an iteration; False if it ends before."""
        metrics = self.folder / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while self.process.poll() is None:
            if metrics.exists() and metrics.stat().st_mtime_ns != before:
                return True
            time.sleep(0.01)
        return False

    def wait_for(self, iterations: float, pace: float) -> None:
        """That many iterations: in seconds alone the run could end first when the machine gets faster."""
        goal = self.iterations() + int(iterations)
        while self.iterations() < goal and self.process.poll() is None:
            time.sleep(0.01)
        time.sleep(pace * (iterations % 1))

    def processes(self) -> dict[str, list[psutil.Process]]:
        """What can be killed: the launcher, torchrun's agent, each rank, both ranks, or everything."""
        try:
            launcher = psutil.Process(self.process.pid)
            agents = launcher.children()
            ranks = [child for agent in agents for child in agent.children()]
        except psutil.NoSuchProcess:
            return {}
        found = {
            "launcher": [launcher],
            "agent": agents,
            "both ranks": ranks,
            "everything": [launcher, *agents, *ranks],
        }
        found |= {f"rank {i}": [rank] for i, rank in enumerate(ranks)}
        return {name: processes for name, processes in found.items() if processes}

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def kill(run: Run, before: dict[Path, float], choices: random.Random) -> Kill:
    """Kills something of the run and waits for the end of the rest, which is what a scheduler does as well."""
    candidates = run.processes()
    descendants = run.descendants()
    what = choices.choice(sorted(candidates))
    for process in candidates[what]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    during = moment(run.checkpoints, before)
    run.process.wait(timeout=SECONDS_TO_END)
    _, left = psutil.wait_procs(descendants, timeout=SECONDS_TO_END)
    leftovers = [" ".join(process.cmdline())[-100:] for process in left]
    for process in left:
        process.kill()
    return Kill(what, during, leftovers=leftovers)


def partial(checkpoints: Path) -> dict[Path, float]:
    """Incomplete checkpoints and when something in them changed last."""
    found = [checkpoint_files.inspect(checkpoints, i) for i in checkpoint_files.iterations(checkpoints)]
    complete = checkpoint_files.State.COMPLETE
    return {c.folder: c.folder.stat().st_mtime for c in found if c.state is not complete and c.folder.is_dir()}


def moment(checkpoints: Path, before: dict[Path, float]) -> str:
    """Where a kill hit, by what changed on disk since the start of the attempt."""
    for folder, changed in partial(checkpoints).items():
        if before.get(folder) != changed:
            return "deletion" if (folder / checkpoint_files.MANIFEST).exists() else "save"
    latest = checkpoint_files.newest_complete(checkpoints)
    tracker = checkpoints / checkpoint_files.TRACKER
    if latest and (not tracker.exists() or tracker.read_text() != str(latest.iteration)):
        return "save (before the tracker)"
    return "training or start"


def disturbed(run: Run, kills: int, iterations: int, pace: float, startup: float, choices: random.Random) -> list[Kill]:
    """Kills ``run`` so many times and lets it end."""
    done: list[Kill] = []
    while True:
        before = partial(run.checkpoints)
        run.start()
        if len(done) == kills:
            run.finish()
            record_start(done, run.log)
            return done
        if choices.random() < 0.25:
            time.sleep(choices.uniform(0, startup))
        elif run.wait_for_training():
            latest = checkpoint_files.newest_complete(run.checkpoints)
            left = iterations - (latest.iteration if latest else 0)
            run.wait_for(choices.uniform(0, 1.5 * left / (kills - len(done) + 1)), pace)
        if run.process.poll() is not None:
            raise SystemExit(f"the run ended before kill {len(done) + 1}:\n{run.log.read_text()[-3000:]}")
        hit = kill(run, before, choices)
        record_start(done, run.log)
        done.append(hit)
        print(f"kill {len(done)}: {hit.what}, during {hit.during}, at iteration {run.iterations()}", flush=True)


def record_start(done: list[Kill], log: Path) -> None:
    """Notes with the last kill before this attempt what the attempt said it starts from."""
    found = re.search(r"continuing from iteration (\d+)|from the beginning", log.read_text())
    if done and found:
        done[-1].resumed = found[1] or "0"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=80, help="even, so that the last one is saved in its turn")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="save asynchronously")
    parser.add_argument("--folder", type=Path, help="keep the runs here; otherwise they are removed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.folder or Path(temporary)
        runs.mkdir(parents=True, exist_ok=True)
        words = ["--train-iters", str(options.iterations), *(["--async-save"] if options.asynchronous else [])]
        straight = Run(runs, "straight", words)
        began = time.monotonic()
        straight.start()
        straight.wait_for_training()
        startup = time.monotonic() - began
        straight.finish()
        pace = (time.monotonic() - began - startup) / options.iterations
        print(
            f"undisturbed: {startup:.1f} s to the first iteration, {pace:.2f} s an iteration with its save", flush=True
        )
        run = Run(runs, "disturbed", words)
        done = disturbed(run, options.kills, options.iterations, pace, startup, random.Random(options.seed))
        assert_same_tensors(run.checkpoints, straight.checkpoints)
        return summarise(done)


def summarise(done: list[Kill]) -> int:
    """Prints what happened; 1 if a process outlived its run."""
    during = [kill.during for kill in done]
    saves = sum(moment.startswith("save") for moment in during)
    leftovers = [line for kill in done for line in kill.leftovers]
    resumed = ", ".join(kill.resumed or "-" for kill in done)
    print(
        f"{len(done)} kills, {saves} of them during a save and {during.count('deletion')} during a deletion; resumed "
        f"{len(done)} of {len(done)} times, from iterations {resumed} (-: killed before it said so); final weights and "
        f"optimizer state identical to the undisturbed run; processes left over: {len(leftovers)}"
    )
    for line in leftovers:
        print(f"left over: {line}")
    return 1 if leftovers else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
