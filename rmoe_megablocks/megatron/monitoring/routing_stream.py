"""Each rank writes what its layers' routers do with its tokens in an exact evaluation, for who joins it afterwards.

Asked for by the environment variable ``RMOE_RECORD_ROUTING``, the folder: it is no argument of a run, as it changes
nothing of one. A rank appends a row a token to ``layer-NNNNN.dp-R.bin`` for each of its layers, in the order of its
micro-batches, window by window, and the last stage the likeliest next tokens to ``predicted.dp-R.bin`` (int32).
``rank-N.json`` says which layers and columns a rank has. Padding windows are among the rows. Disk space:
about 2 E + 2 K + 20 bytes a token and layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor

from rmoe_megablocks.errors import CommonError
from rmoe_megablocks.routing.watching import RECORD_TO, StateWatch, carries, choice_of, row_dtype

SCORE_FUNCTIONS = ("softmax", "sigmoid")
#: others choose by more than a token's own logits, so that a margin would mean nothing
_BY_LOGITS = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
_ONE_PART = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "context_parallel_size": "--context-parallel-size",
}


@contextmanager
def recorded(model: list[torch.nn.Module], args) -> Iterator[None]:
    """Around an evaluation: the routers' files are written if they are asked for.

    Raises:
        CommonError: layouts in which a rank has parts of a window; a dense model.
    """
    folder = os.environ.get(RECORD_TO)
    if not folder:
        yield
        return
    for name, option in _ONE_PART.items():
        if getattr(args, name) > 1:
            raise CommonError(f"{option} {getattr(args, name)}: routing is recorded with 1; leave it out")
    if args.moe_router_score_function not in SCORE_FUNCTIONS:
        raise CommonError(f"--moe-router-score-function {args.moe_router_score_function}: its routing is not recorded")
    kinds = args.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _BY_LOGITS:
            raise CommonError(f"--moe-router-load-balancing-type {kind}: its routing is not recorded")
    if not args.num_experts:
        raise CommonError("a dense model has no routing to record")
    with ExitStack() as stack:
        _Stream(model, args, Path(folder), stack)
        yield


class _Stream:
    """Hooks of all of this rank's routers, until ``stack`` unwinds."""

    def __init__(self, model: list[torch.nn.Module], args, folder: Path, stack: ExitStack) -> None:
        self._args, self._folder, self._stack = args, folder, stack
        chunks = [unwrap_model(chunk) for chunk in model]
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._states = StateWatch(modules)
        stack.callback(self._states.remove)
        routers = [module for module in modules if isinstance(module, TopKRouter) and not module.is_mtp_layer]
        for router in routers:
            self._watch(router)
        layers = [getattr(router, "routing_layer", None) for router in routers]
        said = {
            "layers": [router.layer_number for router in routers],
            "columns": [list(carries(layer)) for layer in layers],
            "state_size": max((layer.own_state_size(layer.config) for layer in layers if layer is not None), default=0),
            "ranks": mpu.get_data_parallel_world_size(),
            "rows": args.eval_micro_batch_size,
        }
        (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
        for chunk in chunks:
            if getattr(chunk, "post_process", False):
                file = self._open("predicted")
                handle = chunk.output_layer.register_forward_hook(partial(self._on_logits, file))
                stack.callback(handle.remove)

    def _open(self, name: str) -> BinaryIO:
        path = self._folder / f"{name}.dp-{mpu.get_data_parallel_rank()}.bin"
        return self._stack.enter_context(path.open("ab"))

    def _watch(self, router: TopKRouter) -> None:
        file = self._open(f"layer-{router.layer_number:05}")
        original = router.routing

        def routing(logits: Tensor, *args, **kwargs):
            weights, chosen = original(logits, *args, **kwargs)
            self._keep(router, file, logits, chosen)
            return weights, chosen

        router.routing = routing  # of this one: the logits leave the router in no other way
        self._stack.callback(delattr, router, "routing")

    @torch.no_grad()
    def _keep(self, router: TopKRouter, file: BinaryIO, logits_SBN: Tensor, chosen_TE: Tensor) -> None:
        args = self._args
        if chosen_TE.dtype != torch.bool:
            raise CommonError(f"a router of {type(router).__name__} does not give a map of its choices")
        layer = getattr(router, "routing_layer", None)
        carried = self._states.take(layer)
        choice = choice_of(
            logits_SBN.reshape(-1, logits_SBN.shape[-1]),
            chosen_TE,
            args.num_experts,
            router.topk,
            router.score_function,
            router.expert_bias,
        )
        columns = {"choices": choice.choices_TK, "scores": choice.scores_TE, "margin": choice.margin_T}
        columns |= {name: getattr(carried, f"{name}_T") for name in carries(layer)}
        rows_T = np.empty(len(choice.margin_T), row_dtype(args.num_experts, router.topk, carries(layer)))
        for name, column in columns.items():
            rows_T[name] = column.cpu().numpy()
        rows_SB = rows_T.reshape(logits_SBN.shape[:2])
        file.write(np.ascontiguousarray(rows_SB.T).tobytes())

    def _on_logits(self, file: BinaryIO, _module, _inputs, output) -> None:
        logits_SBV = output[0] if isinstance(output, tuple) else output
        real = logits_SBV[..., : self._args.vocab_size or None]
        ids_SB = real.argmax(-1).to(torch.int32).cpu().numpy()
        file.write(np.ascontiguousarray(ids_SB.T).tobytes())
