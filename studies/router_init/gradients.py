"""Gradients and Adam's steps of the routing parameters in the first iterations of configs/tiny.yaml.

Training is Megatron's own loop with the configuration's schedule, in one process an arm, ended early. For each kind of
routing parameter, all layers' together: norm of the weights, norm of the gradient before clipping, and the norm of the
step that the optimizer took over that of the weights; ``others`` are all other parameters. The first step is nothing,
as the warm-up starts from a learning rate of 0.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from rmoe_megablocks.launcher.config import load_config, merge, to_argv
from studies.router_init import arms
from studies.router_init.runs import CONFIG

KINDS = {
    "projector": "routing_layer.projector",
    "cell": "rnn_router.cell.",
    "router": "routing_layer.router",
    "linear router": ".mlp.router.weight",
}
OTHERS = "others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="+", default=list(arms.DEFAULT), help=f"default {' '.join(arms.DEFAULT)}")
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 10, 50, 100], help="default 1 10 50 100")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the table to this file, and FILE.json beside it")


def run(args: argparse.Namespace) -> int:
    """Prints the table, an arm after the other in processes of their own: Megatron's state is a process's."""
    found = {}
    for arm in args.arms:
        arms.options(arm)
    for arm in args.arms:
        # not multiprocessing's Pool, whose processes may have no children: Megatron's data loaders are some
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found[arm] = fresh.submit(measure, arm, sorted(args.iterations), args.seed).result()
    table = markdown(found, args.seed)
    print(table, end="")
    if args.output:
        args.output.write_text(table)
        args.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def markdown(found: dict[str, list[dict]], seed: int) -> str:
    """A row for each arm, iteration and kind of parameter."""
    lines = [
        f"configs/tiny.yaml, seed {seed}, one process. Norms over all layers; the gradient's is before clipping, the",
        "step's is relative to the weights.",
        "",
        "| arm | iteration | learning rate | whole gradient | parameter | weights | gradient | step / weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, records in found.items():
        for record in records:
            start = f"| {arm} | {record['iteration']} | {record['learning_rate']:.2g} | {record['grad_norm']:.3g} | "
            for kind, norms in record["kinds"].items():
                figures = (norms["weight"], norms["gradient"], norms["step"] / norms["weight"])
                lines.append(start + f"{kind} | " + " | ".join(f"{figure:.3g}" for figure in figures) + " |")
    return "\n".join(lines) + "\n"


def kind_of(name: str) -> str:
    """Which of KINDS a parameter is, or OTHERS."""
    return next((kind for kind, part in KINDS.items() if part in name), OTHERS)


class Watch:
    """Norms at some iterations, by kind of parameter."""

    def __init__(self, iterations: list[int], clip: float) -> None:
        self.records: list[dict] = []
        self._iterations, self._clip = iterations, clip
        self._named: dict[str, torch.nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}

    def on_model(self, chunks: list[torch.nn.Module]) -> None:
        """Called once the model stands."""
        self._named = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
        self._keep()

    def on_iteration(self, *, loss_dict, learning_rate, iteration, skipped_iter, grad_norm) -> None:
        """Called after the optimizer's step; gradients stay until the next iteration, clipped in place."""
        if iteration in self._iterations:
            scale = max(1.0, (float(grad_norm) + 1e-6) / self._clip) if self._clip else 1.0
            self.records.append(
                {
                    "iteration": iteration,
                    "learning_rate": float(learning_rate),
                    "grad_norm": float(grad_norm),
                    "kinds": self._kinds(scale),
                }
            )
        if iteration + 1 in self._iterations:
            self._keep()

    def _keep(self) -> None:
        self._before = {name: p.detach().clone() for name, p in self._named.items()}

    def _kinds(self, scale: float) -> dict[str, dict[str, float]]:
        squares: dict[str, dict[str, float]] = {}
        for name, parameter in self._named.items():
            before, after = self._before[name], parameter.detach()
            sums = squares.setdefault(kind_of(name), {"weight": 0.0, "gradient": 0.0, "step": 0.0})
            sums["weight"] += before.square().sum().item()
            sums["gradient"] += (parameter.main_grad * scale).square().sum().item()
            sums["step"] += (after - before).square().sum().item()
        order = [kind for kind in (*KINDS, OTHERS) if kind in squares]
        return {kind: {name: math.sqrt(total) for name, total in squares[kind].items()} for kind in order}


def measure(arm: str, iterations: list[int], seed: int) -> list[dict]:
    """Trains the arm up to the last of ``iterations`` in this process, which must be fresh."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port)}
        typed = [*arms.options(arm), "--seed", str(seed), "--pipeline-model-parallel-size", "1", "--no-checkpoints"]
        typed += ["--runs-dir", folder, "--run-name", "gradients", "--exit-interval", str(max(iterations))]
        typed += ["--eval-interval", "100000", "--num-workers", "0"]  # loaders cannot be spawned
        return _train(merge(to_argv(load_config(CONFIG).arguments), typed), iterations)


def _train(argv: list[str], iterations: list[int]) -> list[dict]:
    torch.set_num_threads(1)
    import rmoe_megablocks.megatron  # noqa: F401  CPU mode, in a process that has imported nothing yet
    from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
    from rmoe_megablocks.megatron import pretrain
    from rmoe_megablocks.megatron.resolve import resolve

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        args = resolve(argv).args
        watch = Watch(iterations, args.clip_grad)
        megatron_hooks.observe_training_log(watch.on_iteration)
        with contextlib.suppress(SystemExit):  # --exit-interval
            pretrain.run_megatron(args, watch.on_model)
    return watch.records
