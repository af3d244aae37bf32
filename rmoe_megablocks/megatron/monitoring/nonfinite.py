"""A loss or gradient that is not finite stops all ranks together, before a weight changes, with a report by layer.

Megatron checks on the rank that has the number, and raises there while the others wait in their next collective. Its
default --rerun-mode instead repeats the iteration, saves a checkpoint and exits to be started on other hardware,
and looks at nothing in the first iteration. Both stay available: :func:`choose`.
"""

import argparse
import dataclasses

import torch
from megatron.core import mpu
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from rmoe_megablocks.megatron.monitoring.health import observe_routers
from rmoe_megablocks.megatron.recurrence.router import RecurrentTopKRouter

NO_CHECK = "--no-check-for-nan-in-loss-and-grad"
UPSTREAM_VALIDATION = {"--rerun-mode", "--error-injection-rate", "--check-for-large-grads", "--check-for-spiky-loss"}


class NonFiniteError(Exception):
    """Training cannot go on. Raised by every rank in the same place, with the same text.

    Attributes:
        iteration: the one that was not finished.
        cause: what was not finite, one line.
    """

    def __init__(self, iteration: int, cause: str, lines: list[str]) -> None:
        super().__init__("\n".join([f"iteration {iteration}: {cause}", *lines]))
        self.iteration = iteration
        self.cause = cause


def choose(args: argparse.Namespace) -> None:
    """Sets ``args.stop_on_nonfinite``: "loss", "gradient", both or none, and switches Megatron's own checks off.

    ``args`` are validated and still have ``explicit``. Megatron's checks stay where its validation is asked for and
    where gradients are not in DDP's buffers. Under dynamic loss scaling an overflowed gradient skips a step.
    """
    args.stop_on_nonfinite = ()
    asked = args.rerun_mode != "disabled" and UPSTREAM_VALIDATION & args.explicit
    if NO_CHECK in args.explicit or asked or args.use_megatron_fsdp or args.use_torch_fsdp2:
        return
    dynamic_scale = args.fp16 and not args.loss_scale
    args.stop_on_nonfinite = ("loss",) if dynamic_scale else ("loss", "gradient")
    args.check_for_nan_in_loss_and_grad = False
    args.rerun_mode = "disabled"


_losses: list[Tensor] = []  # of this iteration's micro-batches, where they are computed


def note_loss(loss: Tensor) -> None:
    """Remembers the loss of a micro-batch that will be differentiated, without looking at it."""
    if loss.requires_grad:
        _losses.append(loss.detach())


def install(chunks: list[torch.nn.Module], args: argparse.Namespace) -> None:
    """Has every iteration of ``chunks``, wrapped in DDP, checked between its last gradient and the optimizer.

    The pipeline schedules call ``config.finalize_model_grads_func`` there on every rank; the training loop keeps one
    that is set (training.py:3549).
    """
    _losses.clear()
    if not args.stop_on_nonfinite:
        return
    config = get_model_config(chunks[0])
    watch = _RouterWatch(chunks, config.num_layers, config.mtp_num_layers or 0)
    finalize = config.finalize_model_grads_func or finalize_model_grads

    def finalize_and_check(model, *arguments, **kwargs) -> None:
        finalize(model, *arguments, **kwargs)
        _check(model, watch, args)

    config.finalize_model_grads_func = finalize_and_check


@torch.no_grad()
def _check(model: list[torch.nn.Module], watch: "_RouterWatch", args: argparse.Namespace) -> None:
    """One small reduction over all ranks, the only point where the host waits. Raises NonFiniteError on all or none."""
    bad = torch.zeros(2, dtype=torch.int32, device="cuda")
    if _losses:
        bad[0] = ~torch.stack(_losses).isfinite().all()
    if "gradient" in args.stop_on_nonfinite:
        norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in _gradient_buffers(model)]
        if norms:
            bad[1] = ~torch.stack([norm.float() for norm in norms]).isfinite().all()
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    loss, gradient = bad.tolist()
    if loss or gradient:
        cause = _describe_loss() if loss else "gradients are not finite although every loss is"
        table = _Table.of(model, watch)
        raise NonFiniteError(args.curr_iteration + 1, cause, [*table.lines(), table.origin()])
    _losses.clear()
    watch.clear()


def _gradient_buffers(model: list[torch.nn.Module]) -> list:
    return [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _describe_loss() -> str:
    """The first micro-batch with a loss that is not finite, over all ranks."""
    losses = [(index, value.item()) for index, value in enumerate(_losses, start=1) if not value.isfinite()]
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, losses[:1])
    index, rank, value = min((first[0][0], rank, first[0][1]) for rank, first in enumerate(everywhere) if first)
    return f"the loss of micro-batch {index} is {value} (rank {rank})"


class _RouterWatch:
    """Largest router logit and mean state of every layer in the forwards of this iteration, kept on the device.

    Multi-token prediction layers follow the decoder's.
    """

    def __init__(self, chunks: list[torch.nn.Module], num_layers: int, num_mtp_layers: int) -> None:
        self.num_layers = num_layers
        self.names = [f"layer {n}" for n in range(1, num_layers + 1)]
        self.names += [f"mtp layer {n}" for n in range(1, num_mtp_layers + 1)]
        self.largest_logit_L = torch.zeros(len(self.names), dtype=torch.float32, device="cuda")
        self.state_norm_L = torch.zeros(len(self.names), dtype=torch.float32, device="cuda")
        self.tokens_L = [0] * len(self.names)
        observe_routers(chunks, self._add)

    @torch.no_grad()
    def _add(self, router, logits_TE: Tensor, routing_map_TE: Tensor) -> None:
        if not router.training:
            return
        layer = router.layer_number - 1 + router.is_mtp_layer * self.num_layers  # those are numbered on their own
        largest = self.largest_logit_L[layer]
        torch.maximum(largest, logits_TE.detach().abs().amax().float(), out=largest)
        if isinstance(router, RecurrentTopKRouter) and router.state is not None:
            self.state_norm_L[layer] += torch.linalg.vector_norm(router.state.detach().float(), dim=-1).sum()
            self.tokens_L[layer] += router.state.shape[:-1].numel()

    def clear(self) -> None:
        self.largest_logit_L.zero_()
        self.state_norm_L.zero_()
        self.tokens_L = [0] * len(self.names)


@dataclasses.dataclass
class _Table:
    """Rows: embedding, every layer, what follows the layers, what layers share of the router; the same on every rank.

    Attributes:
        numbers: row -> column -> figure, NaN where one on any rank is.
        names: of the layers, which have the rows 1 to ``len(names)``.
        recurrent: whether there is a state.
    """

    numbers: list[dict[str, float]]
    names: list[str]
    recurrent: bool

    @classmethod
    def of(cls, model: list[torch.nn.Module], watch: _RouterWatch) -> "_Table":
        """Computes the table, a collective call. Gathers the gradients that a distributed optimizer has scattered."""
        layers = len(watch.names)
        _gather_gradients(model)
        squares = torch.zeros(
            layers + 3, 5, dtype=torch.float64, device="cuda"
        )  # grad², weight², bad weights, h, tokens
        for row, parameter, replicas in _parameters(model, watch.num_layers, layers):
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None:
                squares[row, 0] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / replicas
            squares[row, 1] += torch.linalg.vector_norm(parameter, dtype=torch.float64).square() / replicas
            squares[row, 2] += (~parameter.isfinite()).sum() / replicas
        squares[1 : layers + 1, 3] = watch.state_norm_L.double()
        squares[1 : layers + 1, 4] = torch.tensor(watch.tokens_L, dtype=torch.float64)
        torch.distributed.all_reduce(squares)
        # A maximum over ranks would be free to drop a NaN: it travels beside the numbers.
        unknown = watch.largest_logit_L.isnan()
        largest = torch.stack((watch.largest_logit_L.masked_fill(unknown, 0.0), unknown.float()))
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        logits = largest[0].masked_fill(largest[1] > 0, torch.nan).tolist()
        numbers = []
        for row, (grad, weight, bad, state, tokens) in enumerate(squares.tolist()):
            figures = {"|grad|": grad**0.5, "|weight|": weight**0.5, "bad weights": round(bad)}
            if 1 <= row <= layers:
                figures |= {"max |logit|": logits[row - 1]} | ({"mean |h|": state / tokens} if tokens else {})
            numbers.append(figures)
        return cls(numbers, watch.names, any("mean |h|" in figures for figures in numbers))

    def _name(self, row: int) -> str:
        return ["embedding", *self.names, "output", "shared"][row]

    def lines(self) -> list[str]:
        """The table as text."""
        columns = ["max |logit|", *["mean |h|"] * self.recurrent, "|grad|", "|weight|"]
        lines = ["".join([f"{'':<12}", *(f"{column:>13}" for column in columns), "  weights"])]
        shares = bool(self.numbers[-1]["|weight|"])
        rows = range(len(self.names) + 2 + shares)
        for row in rows:
            figures = self.numbers[row]
            cells = [f"{figures[column]:>13.4g}" if column in figures else f"{'-':>13}" for column in columns]
            bad = figures["bad weights"]
            lines.append("".join([f"{self._name(row):<12}", *cells, f"  {bad} not finite" if bad else "  finite"]))
        return lines

    def origin(self) -> str:
        """Names the first place where something is not finite: causes before consequences."""
        names = [self._name(row) for row, figures in enumerate(self.numbers) if figures["bad weights"]]
        if names:
            return f"first place: {names[0]}, whose weights are not finite"
        for column, what in (("max |logit|", "largest router logit"), ("mean |h|", "routing state")):
            rows = self._not_finite(column)
            if rows:
                return (
                    f"first place: {self._name(rows[0])}, whose {what} are not finite; its weights and those before are"
                )
        rows = self._not_finite("|grad|")
        if not rows:
            return "first place: after the last layer; all weights, router logits and gradients are finite"
        layers = [row for row in rows if 1 <= row <= len(self.names)] or rows
        return (
            f"first place: {self._name(layers[0])}, whose gradient is not finite ({len(rows)} places in all); backward "
            f"runs from the last layer to the first, so it began at {self._name(layers[-1])}"
        )

    def _not_finite(self, column: str) -> list[int]:
        finite = torch.isfinite(
            torch.tensor([figures.get(column, 0.0) for figures in self.numbers], dtype=torch.float64)
        )
        return (~finite).nonzero().flatten().tolist()


def _parameters(model: list[torch.nn.Module], decoder_layers: int, layers: int):
    """(row of the table, parameter, on how many ranks it is the same one)."""
    dense = mpu.get_data_parallel_world_size(with_context_parallel=True), mpu.get_tensor_model_parallel_world_size()
    experts = mpu.get_expert_data_parallel_world_size(), mpu.get_expert_tensor_parallel_world_size()
    for chunk in unwrap_model(model):
        rows = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(chunk.decoder.layers)}
        rows |= {f"mtp.layers.{i}.": decoder_layers + 1 + i for i in range(layers - decoder_layers)}  # on one stage
        rows |= {"embedding.": 0, "rnn_router.": layers + 2}
        for name, parameter in chunk.named_parameters():
            row = next((row for prefix, row in rows.items() if name.startswith(prefix)), layers + 1)
            expert = not getattr(parameter, "allreduce", True)
            replicas, tensor = experts if expert else dense
            if not getattr(parameter, "tensor_model_parallel", False):
                replicas *= tensor
            if row == layers + 2:
                replicas *= mpu.get_pipeline_model_parallel_world_size()
            yield row, parameter, replicas


def _gather_gradients(model: list[torch.nn.Module]) -> None:
    """After a reduce-scatter each rank holds one shard of the sums: completes the buffers from the others."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in _gradient_buffers([chunk]):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
