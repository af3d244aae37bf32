"""TRL's SFTTrainer with the model's own balancing loss, and what it tells while it trains."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.finetuning.examples import LEFT_OUT
from rmoe_megablocks.huggingface.layers.balancing import load_balancing_loss
from rmoe_megablocks.process import progress_stream

ROUTER_PARTS = frozenset(("router", "gate", "shared_router"))


class ResponseTrainer(SFTTrainer):
    """SFTTrainer, whose loss is that of the labels, plus ``own_aux_loss`` times a model's own balancing loss.

    TRL 1.16 computes logits and loss itself (``add_fused_lm_head``) and then takes Mixtral's balancing loss, over the
    tokens of all layers at once and without null experts, for any model's. Here it is the sum, or mean, of the layers'
    that the model's configuration names. Over the micro-batches and processes of a step it is a mean with the weights
    of their labels, as in :meth:`.RmoeForCausalLM.forward`.
    """

    def __init__(self, *args, own_aux_loss: float = 0.0, **kwargs) -> None:
        """Args: own_aux_loss: coefficient, for a model whose configuration has RmoeConfig's fields; 0 for others."""
        super().__init__(*args, **kwargs)
        self.own_aux_loss = own_aux_loss
        self._recorded: tuple[Tensor, ...] = ()
        if own_aux_loss:
            backbone = self.model.base_model
            backbone.register_forward_pre_hook(_ask_for_logits, with_kwargs=True)
            backbone.register_forward_hook(self._record)
        self._sums = {"lm_loss": 0.0, "aux_loss": 0.0}

    def _record(self, module: torch.nn.Module, inputs: tuple, outputs: Any) -> None:
        self._recorded = outputs.router_logits

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch: its part of the mean over the labels of a step, times the processes, whose
        gradients are averaged.

        Raises:
            RuntimeError: the Trainer does not say how many labels the step has: a mean of means would weigh them by
                where they stand.
        """
        if num_items_in_batch is None:
            raise RuntimeError("the step's labels were not counted: this release of transformers is not supported")
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        language = loss.detach()
        share = (inputs["labels"][:, 1:] != LEFT_OUT).sum() / num_items_in_batch * self.accelerator.num_processes
        if self.own_aux_loss:
            recorded, self._recorded = self._recorded, ()
            aux = load_balancing_loss(recorded, self.model.config, inputs["attention_mask"]).to(loss.device)
            loss = loss + self.own_aux_loss * share * aux
            self._sums["aux_loss"] += (share * aux).detach()
        elif self.aux_loss_enabled:  # TRL's, of another model
            steps = self.current_gradient_accumulation_steps
            aux = torch.tensor(self._metrics["train"]["aux_loss"][-1] / steps, device=loss.device)
            language = language - self.router_aux_loss_coef * aux
            self._sums["aux_loss"] += aux
        self._sums["lm_loss"] += language
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean loss of the step's labels, without the auxiliary one. Collective."""
        if "loss" in logs:
            found = torch.stack([torch.as_tensor(self._sums[name], device=self.args.device) for name in self._sums])
            found = self.accelerator.reduce(found.float(), reduction="mean").tolist()
            self._metrics["train"].pop("aux_loss", None)
            logs |= dict(zip(self._sums, found, strict=True))
            if not self.has_aux_loss:
                del logs["aux_loss"]
            self._sums = dict.fromkeys(self._sums, 0.0)
        super().log(logs, start_time)

    @property
    def has_aux_loss(self) -> bool:
        """Whether anything is added to the labels' loss."""
        return bool(self.own_aux_loss) or self.aux_loss_enabled

    def create_model_card(self, *args, **kwargs) -> None:
        """None: a checkpoint is no folder to publish."""


def _ask_for_logits(module: torch.nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    return inputs, {**keywords, "output_router_logits": True}


def freeze_router(model: torch.nn.Module) -> list[str]:
    """Leaves out of training whatever belongs to a router: matrices, projectors, shared cell. The parameters' names."""
    frozen = [name for name, _ in model.named_parameters() if ROUTER_PARTS & set(name.split("."))]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


class Telling(TrainerCallback):
    """A progress bar, metrics.jsonl, an end to a loss that is not finite, and one to the training after a signal.

    Attributes:
        stopped: whether a signal has ended the training; its checkpoint is written.
        first, last: lines of metrics.jsonl, None before there is one.
    """

    def __init__(self, path: Path, any_process: Callable[[bool], bool]) -> None:
        """Args: path: of metrics.jsonl. any_process: whether what it is given holds in any process; collective."""
        self._path, self._any = path, any_process
        self.stopped = False
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self._received: list[int] = []
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Drops the lines of steps that are done again; from here on a signal ends the training after its step."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        self._seen, self._since = 0, time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = [line for line in _lines(self._path) if line["iteration"] <= state.global_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if kept:
            self.first, self.last = kept[0], kept[-1]
        stream = progress_stream()
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="fine-tuning",
            unit="step",
            file=stream,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.1 if hasattr(stream, "isatty") else 30,
        )

    def _note(self, number: int, frame: object) -> None:
        self._received.append(number)
        self._release()  # a second one acts as ever

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A line of metrics.jsonl. Raises UsageError for a loss or gradient that is not finite, in every process."""
        if "lm_loss" not in logs:
            return
        names = ("lm_loss", "aux_loss", "grad_norm", "learning_rate")
        line = {"kind": "train", "iteration": state.global_step} | {n: float(logs[n]) for n in names if n in logs}
        for name in names[:3]:
            if not abs(line.get(name, 0.0)) < float("inf"):
                raise UsageError(
                    f"step {state.global_step}: {name} is {line[name]}: nothing of this step is kept; a lower --lr, or "
                    "--dtype float32, may help"
                )
        now, seen = time.perf_counter(), logs["num_tokens"]
        line |= {"tokens": int(seen - self._seen), "seconds": round(now - self._since, 4)}
        self._seen, self._since = seen, now
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.first, self.last = self.first or line, line
            self._bar.set_postfix(loss=f"{line['lm_loss']:.4f}", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_step_end(self, args, state, control, **kwargs):
        """After a signal, whichever process got it: a checkpoint, and the end. Collective."""
        if self._any(bool(self._received)) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Gives signals back, ends the bar; also after an error."""
        self._release()
        if hasattr(self, "_bar"):
            self._bar.close()

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, those of earlier sessions included."""
        return _lines(self._path)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a kill may have cut the last one."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
