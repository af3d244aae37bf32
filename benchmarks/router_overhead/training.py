"""Models of one process that Megatron's own training step trains, each on one batch again and again."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import rmoe_megablocks.megatron  # noqa: F401  CPU mode, before Megatron

# isort: split
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, initialize_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler
from megatron.core.utils import get_model_config
from megatron.training import get_timers, global_vars, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables

from benchmarks.measuring.saved_bytes import SavedBytes
from benchmarks.one_process import parallel_state
from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.inputs import batches
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.recurrence.install import install_router
from rmoe_megablocks.process import quiet_logging


@dataclass(frozen=True)
class Seconds:
    """Of one step: of the clock on the wall, and of the processor (all threads of this process)."""

    wall: float
    processor: float


class TrainedModel:
    """A model with its optimizer. Build it and step it inside :func:`megatron`.

    Args:
        args: from :func:`parsed`.
        seed: of weights and batch.

    Attributes:
        static_bytes: what model, gradients and optimizer take on a GPU, after the first step; 0 on a CPU.
    """

    def __init__(self, args: argparse.Namespace, seed: int = 1234) -> None:
        self._args = args
        global_vars.set_args(args)
        before = _allocated()
        torch.manual_seed(seed)
        model_config = gpt_config_from_args(args)
        install_router(model_config, args)
        with _quiet():
            self.chunks, self._optimizer, self._scheduler = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder,
                cfg_container=pretrain_cfg_container_from_args(args, model_config),
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        self._config = get_model_config(self.chunks[0])
        # what Megatron's train() sets before its loop
        self._config.grad_scale_func = self._optimizer.scale_loss
        self._config.timers = get_timers()
        self._config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.chunks:
            chunk.train()
        self._health = RoutingHealth(args.num_layers, 0, args.num_experts, 0, args.moe_router_topk)
        self._health.measuring = lambda: self._is_logged
        self._health.watch(self.chunks)
        self._is_logged = False
        self._batches = RerunDataIterator(itertools.repeat(_batch(args, seed)))
        self._iteration = 0
        self.step(False)
        self.static_bytes = _allocated() - before

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self._args.micro_batch_size * self._args.seq_length

    def step(self, is_logged: bool) -> tuple[float, float]:
        """One training step; its loss and the norm of its gradients, read as a training loop reads them.

        Args:
            is_logged: the router's figures are measured and read too, as on every tenth step of a run.
        """
        global_vars.set_args(self._args)
        self._is_logged = is_logged
        result = training.train_step(
            batches.forward_step,
            self._batches,
            self.chunks,
            self._optimizer,
            self._scheduler,
            self._config,
            get_forward_backward_func(),
            iteration=self._iteration,
        )
        self._iteration += 1
        if is_logged:
            self._health.report()
        return float(result[0]["lm loss"]), float(result[5])

    def timed(self, is_logged: bool) -> Seconds:
        """One step, from an idle device to an idle device."""
        torch.cuda.synchronize()
        wall, processor = time.perf_counter(), time.process_time()
        self.step(is_logged)
        torch.cuda.synchronize()
        return Seconds(time.perf_counter() - wall, time.process_time() - processor)

    def saved_bytes(self) -> int:
        """What one step's forward pass keeps for its backward pass, parameters left out."""
        with SavedBytes(parameter for chunk in self.chunks for parameter in chunk.parameters()) as saved:
            self.step(False)
        return saved.total

    def peak_bytes(self) -> int:
        """On a GPU: the most that is allocated in a step, beyond what is there before it, and the static bytes."""
        before = _allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(False)
        torch.cuda.synchronize()
        return self.static_bytes + torch.cuda.max_memory_allocated() - before


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments and ours, complete. Raises UsageError for those that do not work together."""
    with _quiet():
        args = arguments.parse(argv)
        arguments.fill_defaults(args)
        args.exit_signal_handler = False  # Ctrl-C ends a benchmark at once
        args.stop_on_nonfinite = ()  # pretrain's check, which is a read an iteration for every router alike
        arguments.validate(args)
    del args.explicit, args.argv, args.as_config
    return args


@contextlib.contextmanager
def megatron(args: argparse.Namespace) -> Iterator[None]:
    """Megatron's global state as ``pretrain`` makes it; gone with the block."""
    with parallel_state(args.seed), contextlib.ExitStack() as ending:
        ending.callback(destroy_moe_metrics_tracker)
        ending.callback(training.destroy_global_state)
        with _quiet():
            set_global_variables(args)
            initialize_rerun_state_machine(mode=RerunMode(args.rerun_mode))
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=torch.cuda.current_device()))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Megatron prints and logs below an error."""
    with contextlib.redirect_stdout(io.StringIO()), quiet_logging():
        yield


def _batch(args: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens [B, S] with the next ones as labels, as a data loader hands them over."""
    shape = (args.micro_batch_size, args.seq_length)
    tokens = torch.randint(args.vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(seed))
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
    }


def _allocated() -> int:
    from rmoe_megablocks.compat import megatron_cpu

    return 0 if megatron_cpu.active() else torch.cuda.memory_allocated()
