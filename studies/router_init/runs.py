"""Starts arms x seeds of configs/tiny.yaml, one CPU process each, and leaves out what is there."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import load_config
from studies.router_init import arms

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "tiny.yaml"
_EVALUATED = 500_000  # tokens of each split of a text that is given
_ONE_PROCESS = "--pipeline-model-parallel-size 1 --no-checkpoints".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-dir", type=Path, required=True, help="folder of the runs, as the launcher's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default 1 to 5")
    parser.add_argument("--arms", nargs="+", default=list(arms.DEFAULT), help=f"default {' '.join(arms.DEFAULT)}")
    parser.add_argument("--iterations-factor", type=int, default=1, help="times the configuration's iterations")
    parser.add_argument("--data", type=Path, help="a text (split 90, 5, 5 %%), or a folder of 'rmoe data prepare'")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")


def run(args: argparse.Namespace) -> int:
    """Runs what is missing; 1 when one of them failed."""
    for option, number in (("--iterations-factor", args.iterations_factor), ("--jobs", args.jobs)):
        if number < 1:
            raise UsageError(f"{option} {number}: must be at least 1")
    commands = list(_commands(args, _dataset(args)))
    todo = [(name, command) for name, command in commands if not is_complete(args.runs_dir / name, _iterations(args))]
    print(f"{len(commands)} runs, {len(commands) - len(todo)} of them done", flush=True)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as workers:
        codes = list(workers.map(lambda job: _start(args.runs_dir, *job), todo))
    return int(any(codes))


def _iterations(args: argparse.Namespace) -> int:
    return int(str(load_config(CONFIG).arguments["--train-iters"])) * args.iterations_factor


def is_complete(folder: Path, iterations: int | None = None) -> bool:
    """Whether a run was trained, for ``iterations`` if that is given, and both splits were evaluated."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return False
    trained = iterations in (None, summary.get("iterations"))
    evaluation = summary.get("evaluation", {})
    return trained and all("tokens" in evaluation.get(split, {}) for split in ("valid", "test"))


def _commands(args: argparse.Namespace, dataset: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Name and command of every run, seed by seed: the arms of a seed are there together."""
    factor = args.iterations_factor
    condition = "+".join([f"x{factor}"] * (factor > 1) + ([dataset.name] if dataset else []))
    common = ["--runs-dir", str(args.runs_dir.resolve()), *_ONE_PROCESS]
    if factor > 1:  # as many points of the curves as a short run has
        common += ["--train-iters", str(_iterations(args)), "--eval-interval", str(40 * factor)]
        common += ["--log-interval", str(10 * factor)]
    if dataset:
        common += ["--dataset", str(dataset), "--eval-tokens", str(_EVALUATED)]
    for seed in args.seeds:
        for arm in args.arms:
            name = str(arms.Name(arm, condition, seed))
            speed = arms.learning_rate_factor(arm)
            entry = ["bash", "launch/pretrain_rmoe.sh", "--nproc-per-node", "1"]
            if speed != 1:
                entry = [sys.executable, "-m", "studies.router_init.entry", str(speed)]
            words = ["--config", str(CONFIG), "--run-name", name, "--seed", str(seed)]
            yield name, [*entry, *words, *common, *arms.options(arm)]


def _start(runs_dir: Path, name: str, command: list[str]) -> int:
    log = runs_dir / f"{name}.log"
    with log.open("w") as output:
        code = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see {log}'}", flush=True)
    return code


def _dataset(args: argparse.Namespace) -> Path | None:
    """The folder of the text that was asked for, made if need be."""
    if args.data is None:
        return None
    if args.data.is_dir():
        return args.data.resolve()
    if not args.data.is_file():
        raise UsageError(f"--data {args.data}: there is no such file or folder")
    folder = (args.runs_dir / "data" / args.data.stem).resolve()
    if not (folder / "dataset.json").exists():
        prepare = [sys.executable, "-m", "rmoe_megablocks.cli", "data", "prepare", str(args.data)]
        if subprocess.run([*prepare, "--split", "90%,5%,5%", "--output", str(folder)]).returncode:
            raise UsageError(f"--data {args.data}: 'rmoe data prepare' could not read it, see above")
    return folder
