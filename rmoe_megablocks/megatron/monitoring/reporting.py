"""What a run tells: progress on the terminal, metrics.jsonl, and Megatron's own output in the run's log folder."""

import contextlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from tqdm import tqdm

from rmoe_megablocks.megatron.monitoring.health import RoutingHealth
from rmoe_megablocks.megatron.monitoring.metrics import Metrics


def log_file(folder: Path) -> Path:
    """What this process's own output goes to: FOLDER/rankN.log."""
    return folder / f"rank{os.environ.get('RANK', '0')}.log"


@contextlib.contextmanager
def megatron_output_to(folder: Path):
    """Sends what Megatron prints and logs in this process to FOLDER/rankN.log; errors still reach the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    with _Log(log_file(folder).open("ab")) as log, contextlib.redirect_stdout(log), _descriptor_to(1, log):
        saved = [(h, h.stream) for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        for handler, _ in saved:
            handler.setStream(log)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for handler, stream in saved:
                handler.setStream(stream)


@contextlib.contextmanager
def _descriptor_to(number: int, log: io.TextIOBase):
    """Sends what compiled code writes to a file descriptor to ``log``: gloo of torch 2.9 tells of its connections."""
    try:
        saved = os.dup(number)
    except OSError:  # closed
        yield
        return
    os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


class _Log(io.TextIOWrapper):
    """A file that loses what a full disk has no room for: figures and checkpoints go to the same one and end the run.

    Otherwise any line that Megatron prints or logs, on any rank, would end it, or be a traceback on the terminal.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """As any text file's."""
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """As any file's."""
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        """As any file's."""
        with contextlib.suppress(OSError):
            super().close()


class Reporter:
    """Follows training. The last rank, which has the loss, writes and prints.

    Args:
        folder: the run's; metrics.jsonl there gets a line an iteration and one an evaluation.
        bytes_per_token: of each split, for bits per character; a split that is not there has none.
        health: asked in the first iteration of a run and on every logged one, None without experts.
        exact: the splits whose exact evaluation follows: drawing batches from "test" is left out then.

    Attributes:
        iteration: the last one that is done in this session, 0 before.
        last_health: what was measured last, where this rank writes.
    """

    def __init__(
        self,
        folder: Path,
        bytes_per_token: Mapping[str, float],
        health: RoutingHealth | None,
        exact: tuple[str, ...] = (),
    ) -> None:
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.health = health
        self.iteration = 0
        self.last_health: dict[str, list[float]] = {}
        self._nats_to_bpc = {split: 1 / (math.log(2) * number) for split, number in bytes_per_token.items()}
        self._exact = exact
        self.writes = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        self._started = self._last = time.perf_counter()
        self._first_iteration: int | None = None
        self._evaluated_at: int | None = None
        self._bar: tqdm | None = None
        self._since_line: list[dict] = []  # records of the iterations since the last line

    def start(self) -> None:
        """Called when the model stands: the clock of the first iteration starts."""
        self._last = time.perf_counter()
        # a graph of the whole iteration asks once, while it is captured: it measures every iteration
        if self.health is not None and get_args().cuda_graph_impl != "full_iteration":
            self.health.measuring = _is_measured

    def on_iteration(self, loss_dict, learning_rate, iteration, skipped_iter, grad_norm) -> None:
        """An iteration is done. See :func:`rmoe_megablocks.compat.megatron.hooks.observe_training_log`."""
        args = get_args()
        self.iteration = iteration
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        is_logged = iteration % args.log_interval == 0
        health = self.health.report() if self.health is not None and (is_logged or iteration == 1) else None
        if not self.writes:
            return
        if self._first_iteration is None:
            self._first_iteration = iteration
            self.metrics.resume(iteration)
            self._open(iteration, args.train_iters)
        record = self._record(args, loss_dict, learning_rate, iteration, skipped_iter, grad_norm, seconds)
        self.metrics.add("train", record | ({"routing": health} if health else {}))
        self.last_health = health or self.last_health
        self._since_line.append(record)
        self._bar.update(iteration - self._bar.n)  # Megatron says nothing of --iterations-to-skip
        if "bpc" in record and iteration % args.tensorboard_log_interval == 0:
            _to_writers({"bpc": record["bpc"]}, iteration)
        if health:
            _to_writers(
                {f"routing/{name}/layer_{i}": v for name, values in health.items() for i, v in enumerate(values)},
                iteration,
            )
            if iteration == 1 and health["logits_std"]:
                self.say(_fitting(_start_words(health, self.health.num_logits)))
        if is_logged or iteration == args.train_iters:
            self.say(_fitting(self._words(record, health, args)))
            self._since_line.clear()

    def _open(self, iteration: int, train_iters: int) -> None:
        self._bar = tqdm(
            total=train_iters,
            initial=iteration - 1,
            unit="it",
            file=sys.__stderr__,
            disable=not sys.__stderr__.isatty(),
            dynamic_ncols=True,
        )

    def _record(self, args, loss_dict, learning_rate, iteration, skipped_iter, grad_norm, seconds) -> dict:
        # of this iteration: --step-batch-size-schedule changes it, --decrease-batch-size-if-needed rounds it
        tokens = get_current_running_global_batch_size() * args.seq_length
        return (
            {"iteration": iteration}
            | (self._losses("train", loss_dict) if loss_dict else {"lm_loss": None})
            | {
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "learning_rate": learning_rate,
                "skipped": bool(skipped_iter),
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )

    def _losses(self, split: str, losses: dict) -> dict[str, float]:
        """Nats a token, and bits per character where the split's bytes are known."""
        nats = float(losses["lm loss"])
        return {"lm_loss": nats} | ({"bpc": nats * self._nats_to_bpc[split]} if split in self._nats_to_bpc else {})

    def _words(self, record: dict, health: dict | None, args) -> list[str]:
        done = record["iteration"] - self._first_iteration + 1
        left = (args.train_iters - record["iteration"]) * (self._last - self._started) / done
        words = [_progress(record["iteration"], args)]
        words += _loss_words(record)
        if record["grad_norm"] is not None:
            words.append(f"grad {record['grad_norm']:.2f}")
        tokens, seconds = (sum(r[key] for r in self._since_line) for key in ("tokens", "seconds"))
        words += [f"{tokens / seconds:,.0f} tokens/s", f"left {tqdm.format_interval(max(0, left))}"]
        if health and health["load_balancing_loss"]:
            words.append(f"balance {_mean(health['load_balancing_loss']):.3f}")
            if "real_experts_per_token" in health:
                words.append(f"experts {_mean(health['real_experts_per_token']):.2f}")
            words.append(f"entropy {_mean(health['router_entropy']):.2f}")
            words.append(f"logits {_mean(health['logits_std']):.2g}")
            words.append("busiest " + " ".join(f"{share:.2f}" for share in health["busiest_expert_share"][:8]))
            if "state_norm" in health:
                words.append(f"|h| {_mean(health['state_norm']):.2f}")
        return words

    def wants_evaluation(self, split: str, iteration: int) -> bool:
        """Whether Megatron's loop shall draw batches of ``split``; the same on every rank.

        Not when the last iteration was evaluated just before the training ended, and not what comes exactly.
        """
        if split == "valid":
            return iteration != self._evaluated_at
        if get_args().multiple_validation_sets and split not in self._exact:
            self.say("test is not evaluated: Megatron takes it for one of several validation sets, and fails")
            return False
        return split not in self._exact

    def on_evaluation(self, split: str, index: int, iteration: int, losses: dict, seconds: float) -> None:
        """A set is evaluated. See :func:`rmoe_megablocks.compat.megatron.hooks.observe_evaluations`."""
        args = get_args()
        if split == "valid":
            self._evaluated_at = iteration
        self._last = time.perf_counter()  # the next iteration's seconds are its own
        if not self.writes or not losses:
            return
        name, batches = "", args.eval_iters
        if split == "valid" and args.multiple_validation_sets:
            name = args.validation_set_names[index] if args.validation_set_names else str(index)
            batches = args.eval_iters[index]
        record = {"iteration": iteration} | ({"set": name} if name else {}) | self._losses(split, losses)
        record["tokens"] = batches * args.eval_global_batch_size * args.seq_length
        if self.iteration:  # this session trains: an evaluation alone adds nothing to the curve
            self.metrics.add(split, record | {"trained_tokens": self.metrics.trained_tokens, "seconds": seconds})
            if "bpc" in record and split == "valid":
                _to_writers({f"bpc validation{'-' * bool(name)}{name}": record["bpc"]}, iteration)
        words = [_progress(iteration, args), f"{split} {name}".rstrip(), *_loss_words(record)]
        self.say(_fitting([*words, f"{record['tokens']:,} tokens", tqdm.format_interval(seconds)]))

    def say(self, text: str) -> None:
        """One line to the terminal, from the rank that writes."""
        if self.writes:
            tqdm.write(text, file=sys.__stderr__)

    def stop(self, iteration: int, cause: str) -> None:
        """Ends the progress bar and metrics.jsonl with an iteration that could not be finished."""
        self.close()
        if self.writes:
            self.metrics.add("stopped", {"iteration": iteration, "stopped": cause})

    def close(self) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _is_measured() -> bool:
    """Whether the routing of the iteration that is being trained is told; curr_iteration counts those before it."""
    args = get_args()
    return args.curr_iteration == 0 or (args.curr_iteration + 1) % args.log_interval == 0


def _progress(iteration: int, args) -> str:
    return f"iteration {iteration:>6}/{args.train_iters}"


def _start_words(health: dict, num_logits: int) -> list[str]:
    """Of the routing as it was drawn, in less than 80 columns: gates that start flat (logits near 0) part late."""
    spreads = health["logits_std"]
    if len(spreads) <= 4:
        layers = " ".join(f"{spread:.2g}" for spread in spreads)
    else:
        layers = f"{min(spreads):.2g} to {max(spreads):.2g} in {len(spreads)} layers"
    entropy = f"entropy {_mean(health['router_entropy']):.3f} of {math.log(num_logits):.3f}"
    return ["at the start", f"logits' std {layers}", entropy]


def _loss_words(record: dict) -> list[str]:
    words = [] if record["lm_loss"] is None else [f"loss {record['lm_loss']:.4f}"]
    return words + ([f"bpc {record['bpc']:.3f}"] if "bpc" in record else [])


def _fitting(words: list[str]) -> str:
    """``words`` as one line: on a terminal the first of them that fit (metrics.jsonl has all), elsewhere all."""
    columns = os.get_terminal_size(sys.__stderr__.fileno()).columns if sys.__stderr__.isatty() else 0
    while columns and len(words) > 1 and len(" | ".join(words)) >= columns:
        words = words[:-1]
    return " | ".join(words)


def _to_writers(scalars: dict[str, float], iteration: int) -> None:
    """Figures to TensorBoard and W&B where Megatron's flags opened them."""
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(scalars, iteration)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
