"""One process of Megatron's loop on the CPU, for --cuda-graph-impl full_iteration: who reads on the host, and what a
replay of the recorded operations leaves out. It is written to found.json.

A CUDA graph repeats the kernels that were launched while it was captured, on the same memory, and none of the host's
Python. :class:`Graph` does the same with torch's operations, so that whatever our code does on the host in each
iteration is missing here too. What it cannot show: kernels that a capture does not take, streams, NCCL.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from rmoe_megablocks.megatron import pretrain  # isort: skip  before Megatron: CPU mode
import megatron.core.full_cuda_graph as full_cuda_graph
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.training import get_args, training
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmoe_megablocks.compat.megatron import hooks as megatron_hooks
from rmoe_megablocks.kernels import gru_arithmetic
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.monitoring.reporting import Reporter
from rmoe_megablocks.megatron.recurrence import router
from rmoe_megablocks.megatron.resolve import resolve
from tests.distributed.arguments import ALL_CELLS, BASE

ITERATIONS, LOGGED = 4, 3
PADDED = "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity".split()
UNCHECKED = ["--no-check-for-nan-in-loss-and-grad"]
ARGV = [*BASE, *PADDED, "--train-iters", str(ITERATIONS), "--log-interval", str(LOGGED), "--no-checkpoints"]
PACKAGE = str(Path(pretrain.__file__).parents[1])

# torch's functions that hand a tensor's values to the host, and operations whose result's size is read there
FUNCTIONS = {"item", "tolist", "cpu", "numpy", "__array__"}
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}


def place() -> tuple[str, bool] | None:
    """FILE:FUNCTION of this package where a call into torch was made, None of another's; and whether the schedule of
    forward and backward passes, which is what is captured, was under way. The frame that called is the one that
    counts: below our layers run Megatron's, whose reads are its own."""
    frame, found, captured = sys._getframe(1), None, False
    while frame is not None:
        file = frame.f_code.co_filename
        if (
            found is None
            and "/torch/" not in file
            and not file.endswith(("full_iteration.py", "megatron_cpu/device.py"))
        ):
            found = file
            name = f"{Path(file).name}:{frame.f_code.co_name}"
        captured = captured or frame.f_code.co_name.startswith("forward_backward_")
        frame = frame.f_back
    return (name, captured) if found and found.startswith(PACKAGE) and "/compat/" not in found else None


class Reads:
    """Notes ``[iteration, FILE:FUNCTION, captured]`` of every read on the host that this package makes."""

    def __init__(self) -> None:
        self.found = []

    def note(self) -> None:
        if (where := place()) is not None:
            self.found.append([getattr(get_args(), "curr_iteration", -1) + 1, *where])

    @contextlib.contextmanager
    def watched(self):
        reads = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if getattr(function, "__name__", "") in FUNCTIONS:
                    reads.note()
                return function(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                packet = function._schema.name.removeprefix("aten::")
                masked = packet.startswith("index") and any(
                    isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
                )
                if packet in OPERATIONS or masked:
                    reads.note()
                return function(*args, **(kwargs or {}))

        with Functions(), Operations():
            yield


class Graph:
    """In the place of torch.cuda.CUDAGraph: the operations of a capture, repeated on the tensors that they had.

    The capture runs them, where a GPU's does not: the first replay is left out.
    """

    def __init__(self) -> None:
        self.calls, self.replays = [], 0

    def register_generator_state(self, state) -> None:
        pass

    @contextlib.contextmanager
    def capture(self):
        calls = self.calls

        class Recorded(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                calls.append((function, args, kwargs or {}, result))
                return result

        with Recorded():
            yield

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for function, args, kwargs, result in self.calls:
            fresh = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def run(folder: Path, name: str, *argv: str, graph: bool = False, measured_as_logged: bool = False) -> dict:
    """Losses, gradient norms and last health of a run; the reads of one without a graph."""
    losses, norms, reads = [], [], Reads()
    args = resolve([*ARGV, *argv, "--runs-dir", str(folder), "--run-name", name]).args
    (folder / name).mkdir(exist_ok=True)
    reporters = []

    def on_model(chunks) -> None:
        health = RoutingHealth(args.num_layers, 0, args.num_experts)
        health.watch(chunks)
        reporter = Reporter(folder / name, {}, health)
        reporters.append(reporter)
        if graph:  # from here on: the CPU's generators are not made for graphs, and nothing here draws
            get_args().cuda_graph_impl, get_args().cuda_graph_warmup_steps = "full_iteration", 1

        def on_iteration(**values) -> None:
            losses.append(float(values["loss_dict"]["lm loss"]))
            norms.append(float(values["grad_norm"]))
            reporter.on_iteration(**values)

        megatron_hooks.observe_training_log(on_iteration)
        reporter.start()
        if measured_as_logged:
            from rmoe_megablocks.megatron.monitoring import reporting

            health.measuring = reporting._is_measured

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, lambda graph, **options: graph.capture()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.nullcontext() if graph else reads.watched():
        pretrain.run_megatron(args, on_model)
    wrapper = full_cuda_graph.FullCudaGraphWrapper
    replays = wrapper.cuda_graph["training"].replays if graph else 0
    wrapper.cuda_graph, wrapper.result = dict.fromkeys(wrapper.cuda_graph), dict.fromkeys(wrapper.result)
    wrapper.curr_iteration = dict.fromkeys(wrapper.curr_iteration, 0)
    full_cuda_graph.StaticBufferLoader.static_buffers = {"training": [], "validation": []}
    last = reporters[0].health.report()
    destroy_moe_metrics_tracker()
    training.destroy_global_state()
    return {"losses": losses, "norms": norms, "health": last, "reads": reads.found, "replays": replays}


def planted() -> None:
    """A value read in the router's forward and in the recurrence's backward pass, as if it stood in their files."""
    for place, name, source in (
        (
            router,
            "gating",
            "def gating(*args):\n    found = original(*args)\n    found.sum().item()\n    return found\n",
        ),
        (gru_arithmetic, "backward", "def backward(*args):\n    bool(args[0].any())\n    return original(*args)\n"),
    ):
        owner = router.RecurrentTopKRouter if place is router else place
        names = {"original": getattr(owner, name)}
        exec(compile(source, place.__file__, "exec"), names)
        setattr(owner, name, names[name])


def main(folder: str) -> None:
    """All runs, one after another in one process group."""
    at = Path(folder)
    bf16 = ["--bf16", "--moe-router-dtype", "fp32"]
    found = {"plain bf16": run(at, "1", *UNCHECKED, *bf16), "graph bf16": run(at, "2", *UNCHECKED, *bf16, graph=True)}
    if ALL_CELLS:
        found["plain"] = run(at, "3", *UNCHECKED)
        found["graph"] = run(at, "4", *UNCHECKED, graph=True)
        found["measured when captured"] = run(at, "5", *UNCHECKED, graph=True, measured_as_logged=True)
    found["checked"] = run(at, "6", "--train-iters", "1")
    planted()
    found["planted"] = run(at, "7", *UNCHECKED, "--train-iters", "1")
    (at / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
