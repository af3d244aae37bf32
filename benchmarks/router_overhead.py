"""What the recurrent router costs: whole training runs with ``gru`` and ``linear``, same everything else, in turn.

Every run is a fresh process through the launcher, so that the figures are those of Megatron's real loop: gradients,
optimizer, reporting and all. Runs alternate (A B, B A, A B, ...), and the ratio is taken pair by pair: a machine
whose speed drifts slows both of a pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine

TINY = "--config configs/tiny.yaml".split()
# Two layers of the paper's 0.91B model on bytes, one process: hidden 1280, 20 heads, 16 experts top-4, ffn 448, p 128
SLICE = (
    "--config configs/tiny.yaml --num-layers 2 --hidden-size 1280 --num-attention-heads 20 --ffn-hidden-size 448 "
    "--num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 448 --moe-router-rnn-hidden-size 128 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 1 --pipeline-model-parallel-size 1 "
    "--lr 4.2e-4 --min-lr 4.2e-5"
).split()
MODELS = {"tiny": TINY, "slice of 0.91B": SLICE}
ROUTERS = ("gru", "linear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=5, help="runs of each router (default 5)")
    parser.add_argument("--iterations", type=int, default=16, help="iterations a run (default 16)")
    parser.add_argument("--warmup", type=int, default=4, help="first iterations of a run that do not count (default 4)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))


def run(args: argparse.Namespace) -> str:
    lines = [
        f"{machine.describe()}",
        f"{args.pairs} pairs of runs, {args.iterations} iterations each, {args.warmup} of them warm-up, seed 1234",
        "",
        "| model | router | step ms: median (min-max of runs) | peak MiB a process | gru / linear: time | memory |",
        "|---|---|---|---|---|---|",
    ]
    for model in args.models:
        lines += _measure(model, args)
    return "\n".join(lines)


def _measure(model: str, args: argparse.Namespace) -> list[str]:
    seconds = {router: [] for router in ROUTERS}
    memory = {router: [] for router in ROUTERS}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            for router in ROUTERS if pair % 2 == 0 else ROUTERS[::-1]:
                result = _train(Path(folder), f"{router}{pair}", model, router, args)
                seconds[router].append(result[0])
                memory[router].append(result[1])
                print(f"{model}: {router} {result[0] * 1e3:.1f} ms, {result[1] / 2**20:.0f} MiB", file=sys.stderr)
    time_ratios = [a / b for a, b in zip(seconds["gru"], seconds["linear"], strict=True)]
    memory_ratio = statistics.median(memory["gru"]) / statistics.median(memory["linear"])
    rows = []
    for router in ROUTERS:
        times = [1e3 * value for value in seconds[router]]
        step = f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
        ratio = ""
        if router == "gru":
            ratio = f"{statistics.median(time_ratios):.3f} ({min(time_ratios):.3f}-{max(time_ratios):.3f})"
        peak = f"{statistics.median(memory[router]) / 2**20:.0f}"
        rows.append(f"| {model} | {router} | {step} | {peak} | {ratio} | {f'{memory_ratio:.3f}' if ratio else ''} |")
    return rows


def _train(folder: Path, name: str, model: str, router: str, args: argparse.Namespace) -> tuple[float, int]:
    """(median seconds an iteration, peak bytes of the largest process) of one run."""
    command = [sys.executable, "-m", "rmoe_megablocks.launcher", *MODELS[model], "--moe-router-type", router]
    command += ["--train-iters", str(args.iterations), "--runs-dir", str(folder), "--run-name", name]
    command += ["--eval-iters", "0", "--log-interval", "100000", "--no-checkpoints", "--no-final-evaluation"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    summary = json.loads((folder / name / "summary.json").read_text())
    return statistics.median(r["seconds"] for r in records[args.warmup :]), summary["peak_memory_bytes"]
