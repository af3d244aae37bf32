"""Runs training cases one after another in one process group: ``torchrun -m tests.distributed.worker CASES.json OUT``.

A case is {"name", "argv", "collect": [...], "break": "...", "may_fail": whether the next case runs although this one
raised on all ranks}. Every rank writes OUT/NAME.RANK.pt with its losses and gradient norms by iteration and whatever
``collect`` asks for.
"""

import collections
import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from rmoe_megablocks.megatron import pretrain  # isort: skip  before Megatron: CPU mode
from megatron.core import mpu
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args, training

from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.monitoring import evaluation
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.null_experts import options as null_experts
from rmoe_megablocks.megatron.recurrence.layer import RecurrentTransformerLayer
from rmoe_megablocks.megatron.resolve import resolve
from tests.distributed import attention, breakages, traffic
from tests.docstrings import parse_docstrings_once


def global_parameters(chunks):
    """(name that does not depend on the layout, parameter) of this process."""
    for chunk in unwrap_model(chunks):
        offsets = {
            f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
            for i, layer in enumerate(chunk.decoder.layers)
        }
        for name, parameter in chunk.named_parameters():
            for local, everywhere in offsets.items():
                if name.startswith(local):
                    name = everywhere + name.removeprefix(local)
                    break
            yield name, parameter


class Recorder:
    """Collects what a case asks for while Megatron trains."""

    def __init__(self, collect: list[str]) -> None:
        self.collect = set(collect)
        self.result = {"loss": [], "grad_norm": [], "states": {}, "gradients": {}, "weights": {}}
        self.chunks = []

    def on_model(self, chunks):
        self.chunks = chunks
        config = get_model_config(chunks[0])
        if "attention" in self.collect:
            self.result["attention"] = attention.deviations(config)
        if "health" in self.collect:
            sizes = (config.num_moe_experts, null_experts.of(config), config.moe_router_topk)
            self.health = RoutingHealth(config.num_layers, config.mtp_num_layers or 0, *sizes)
            self.health.watch(chunks)
        if "states" in self.collect:
            for chunk in unwrap_model(chunks):
                for layer in chunk.decoder.layers:
                    if isinstance(layer, RecurrentTransformerLayer):
                        layer.register_forward_hook(self._record_state)

    def _record_state(self, layer, args, output):
        if layer.training and torch.is_grad_enabled():
            self.result["states"].setdefault(layer.layer_number, []).append(output[1].detach().clone())

    def on_iteration(self, *, loss_dict, learning_rate, iteration, skipped_iter, grad_norm):
        loss = torch.zeros(1, dtype=torch.float64)
        if loss_dict:
            loss[0] = float(loss_dict["lm loss"])
        last = torch.distributed.get_world_size() - 1
        torch.distributed.broadcast(loss, last)
        self.result["loss"].append(loss.item())
        self.result["grad_norm"].append(float(grad_norm))
        if "gradients" in self.collect and iteration == 1:
            trained = ((name, p) for name, p in global_parameters(self.chunks) if p.requires_grad)
            self.result["gradients"] = {name: p.main_grad.detach().clone() for name, p in trained}

    def finish(self):
        if "health" in self.collect:
            self.result["health"] = self.health.report()
        if "evaluation" in self.collect:  # of a text that leaves part of the last window and of the last batch empty
            text = np.random.default_rng(1).integers(0, 256, 10 * get_args().seq_length + 7)
            self.result["evaluation"] = evaluation.mean_loss(self.chunks, text)
        if "weights" in self.collect:
            self.result["weights"] = {n: p.detach().clone() for n, p in global_parameters(self.chunks)}
        return self.result


def run_case(case: dict) -> dict:
    recorder = Recorder(case.get("collect", []))
    with breakages.applied(case.get("break")), traffic.counted("traffic" in recorder.collect) as counts:
        args = resolve(case["argv"]).args
        megatron_hooks.observe_training_log(recorder.on_iteration)
        try:
            pretrain.run_megatron(args, on_model=recorder.on_model)
        except SystemExit as exit:
            recorder.result["exit"] = exit.code
        return recorder.finish() | {"pipeline_rank": mpu.get_pipeline_model_parallel_rank(), "traffic": counts}


class _ProcessGroups:
    """Groups of one case serve the next ones: Megatron makes dozens for each, and none of them ever ends by itself.

    The n-th group of the same ranks in a case is the n-th of every case. All ranks ask for the same groups in the
    same order, so they agree.
    """

    def __init__(self) -> None:
        self._groups = {}
        self._asked = collections.Counter()
        self._new = torch.distributed.new_group
        torch.distributed.new_group = self

    def __call__(self, ranks: list[int] | None = None, **options):
        key = (tuple(ranks or ()), options.get("backend"), options.get("timeout"))
        self._asked[key] += 1
        numbered = (*key, self._asked[key])
        if numbered not in self._groups:
            self._groups[numbered] = self._new(ranks, **options)
        return self._groups[numbered]

    def next_case(self) -> None:
        self._asked.clear()


def main(cases_file: str, out: str) -> None:
    """Runs the cases of a file as the rank that the environment names."""
    parse_docstrings_once()
    groups = _ProcessGroups()
    rank = int(os.environ["RANK"])
    only = os.environ.get("CASES")
    for case in json.loads(Path(cases_file).read_text()):
        if only and case["name"] not in only.split(","):
            continue
        log, started = io.StringIO(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(log):
                result = run_case(case)
        except BaseException as error:  # reported by the test that reads the result
            result = {"error": traceback.format_exc(), "log": log.getvalue()[-4000:]}
            if case.get("may_fail"):
                result = {"refused": str(error)} if isinstance(error, UsageError) else {"failed": repr(error)}
        if rank == 0:
            print(f"{time.perf_counter() - started:6.2f} s  {case['name']}", flush=True)
        torch.save(result, Path(out) / f"{case['name']}.{rank}.pt")
        if "error" in result:
            print(result["error"], file=sys.stderr)
            os._exit(1)  # the other ranks may wait for this one
        destroy_moe_metrics_tracker()
        training.destroy_global_state()
        groups.next_case()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
