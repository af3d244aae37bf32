"""What a run tells: progress on the terminal, metrics.jsonl, and Megatron's own output in the run's log folder."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import torch
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from tqdm import tqdm

from rmoe_megablocks.megatron.checkpoints.files import write_atomically
from rmoe_megablocks.megatron.monitoring.health import RoutingHealth


def log_file(folder: Path) -> Path:
    """What this process's own output goes to: FOLDER/rankN.log."""
    return folder / f"rank{os.environ.get('RANK', '0')}.log"


@contextlib.contextmanager
def megatron_output_to(folder: Path):
    """Sends what Megatron prints and logs in this process to FOLDER/rankN.log; errors still reach the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    with log_file(folder).open("a", buffering=1) as log, contextlib.redirect_stdout(log):
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


class Reporter:
    """Follows training. The last rank, which has the loss, writes and prints.

    Args:
        folder: the run's; metrics.jsonl there gets a line an iteration.
        bytes_per_token: of the training split, for bits per character; None leaves them out.
        health: asked on every logged iteration, None without experts.
    """

    def __init__(self, folder: Path, bytes_per_token: float | None, health: RoutingHealth | None) -> None:
        self.path = folder / "metrics.jsonl"
        self.health = health
        self._nats_to_bpc = 1 / (math.log(2) * bytes_per_token) if bytes_per_token else None
        self._writes = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        self._started = self._last = time.perf_counter()
        self._first_iteration: int | None = None
        self._bar: tqdm | None = None
        self._since_line: list[dict] = []  # records of the iterations since the last line
        self.iteration = 0  # the last one that is done

    def start(self) -> None:
        """Called when the model stands: the clock of the first iteration starts, and its health may be wanted."""
        self._last = time.perf_counter()
        if self.health is not None:
            self.health.measuring = get_args().log_interval == 1

    def on_iteration(self, loss_dict, learning_rate, iteration, skipped_iter, grad_norm) -> None:
        """An iteration is done. See :func:`rmoe_megablocks.compat.megatron_hooks.observe_training_log`."""
        args = get_args()
        self.iteration = iteration
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        health = None
        if self.health is not None:
            if iteration % args.log_interval == 0:
                health = self.health.report()
            self.health.measuring = (iteration + 1) % args.log_interval == 0
        if not self._writes:
            return
        if self._first_iteration is None:
            self._first_iteration = iteration
            self._open(iteration, args.train_iters)
        record = self._record(args, loss_dict, learning_rate, iteration, skipped_iter, grad_norm, seconds)
        with self.path.open("a") as file:
            file.write(json.dumps(record | ({"routing": health} if health else {})) + "\n")
        self._since_line.append(record)
        self._bar.update(1)
        if health:
            self._to_writers(health, iteration)
        if iteration % args.log_interval == 0 or iteration == args.train_iters:
            tqdm.write(self._line(record, health, args), file=sys.__stderr__)
            self._since_line.clear()

    def _open(self, iteration: int, train_iters: int) -> None:
        """Drops lines of iterations that a resumed run does again, and starts the progress bar."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _iteration(line) < iteration]
            write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._bar = tqdm(
            total=train_iters,
            initial=iteration - 1,
            unit="it",
            file=sys.__stderr__,
            disable=not sys.__stderr__.isatty(),
            dynamic_ncols=True,
        )

    def _record(self, args, loss_dict, learning_rate, iteration, skipped_iter, grad_norm, seconds) -> dict:
        tokens = args.global_batch_size * args.seq_length
        record = {"iteration": iteration, "lm_loss": float(loss_dict["lm loss"]) if loss_dict else None}
        if self._nats_to_bpc and record["lm_loss"] is not None:
            record["bpc"] = record["lm_loss"] * self._nats_to_bpc
        return record | {
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "learning_rate": learning_rate,
            "skipped": bool(skipped_iter),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _line(self, record: dict, health: dict | None, args) -> str:
        done = record["iteration"] - self._first_iteration + 1
        left = (args.train_iters - record["iteration"]) * (self._last - self._started) / done
        words = [f"iteration {record['iteration']:>6}/{args.train_iters}"]
        if record["lm_loss"] is not None:
            words.append(f"loss {record['lm_loss']:.4f}")
        if "bpc" in record:
            words.append(f"bpc {record['bpc']:.3f}")
        if record["grad_norm"] is not None:
            words.append(f"grad {record['grad_norm']:.2f}")
        tokens, seconds = (sum(r[key] for r in self._since_line) for key in ("tokens", "seconds"))
        words += [f"{tokens / seconds:,.0f} tokens/s", f"left {tqdm.format_interval(max(0, left))}"]
        if health and health["load_balancing_loss"]:
            words.append(f"balance {_mean(health['load_balancing_loss']):.3f}")
            words.append("busiest " + " ".join(f"{share:.2f}" for share in health["busiest_expert_share"][:8]))
            words.append(f"entropy {_mean(health['router_entropy']):.2f}")
            if "state_norm" in health:
                words.append(f"|h| {_mean(health['state_norm']):.2f}")
        return " | ".join(words)

    def _to_writers(self, health: dict, iteration: int) -> None:
        """The same figures to TensorBoard and W&B where Megatron's flags opened them."""
        scalars = {f"routing/{name}/layer_{i}": v for name, values in health.items() for i, v in enumerate(values)}
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb:
            wandb.log(scalars, iteration)

    def say(self, text: str) -> None:
        """One line to the terminal, from the rank that writes."""
        if self._writes:
            tqdm.write(text, file=sys.__stderr__)

    def stop(self, iteration: int, cause: str) -> None:
        """Ends the progress bar and metrics.jsonl with an iteration that could not be finished."""
        self.close()
        if self._writes:
            with self.path.open("a") as file:
                file.write(json.dumps({"iteration": iteration, "stopped": cause}) + "\n")

    def close(self) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def totals(self) -> dict:
        """Seconds and tokens of all iterations in metrics.jsonl, over all sessions of the run."""
        records = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return {key: sum(record.get(key) or 0 for record in records) for key in ("seconds", "tokens")}


def _iteration(line: str) -> int:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError):  # the last line of a killed process may be cut
        return sys.maxsize


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
