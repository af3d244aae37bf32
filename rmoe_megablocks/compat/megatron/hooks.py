"""Every place where the adapter replaces a name inside Megatron, with the reason. All of them are idempotent."""

import argparse
import dataclasses
import inspect
import time
from collections.abc import Callable

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import training
from megatron.training.models import gpt


def use_p2p_communicator(communicator: type) -> None:
    """Both pipeline schedules build ``schedules.P2PCommunicator``, looked up when called; they offer no argument for
    another message width (schedules.py:1157 and 2116 take config.hidden_size), and pretrain(p2p_communicator=)
    wants process groups that exist only later."""
    schedules.P2PCommunicator = communicator


def use_alltoall_dispatcher(dispatcher: type) -> None:
    """MoE layers make their dispatcher by a name of their module, looked up when called (moe_layer.py:319)."""
    moe_layer.MoEAlltoAllTokenDispatcher = dispatcher


def count_experts(of_token: Callable[[argparse.Namespace], float]) -> None:
    """Has Megatron's FLOPs, and the throughput it logs, count ``of_token(args)`` experts a token.

    ``training.num_floating_point_operations``, looked up when called (training.py:2827 and 3963), takes
    args.moe_router_topk.
    """
    original = getattr(training.num_floating_point_operations, "original", training.num_floating_point_operations)

    def num_floating_point_operations(args, *others, **named):
        counted = argparse.Namespace(**(vars(args) | {"moe_router_topk": of_token(args)}))
        return original(counted, *others, **named)

    num_floating_point_operations.original = original
    training.num_floating_point_operations = num_floating_point_operations


def change_mtp_layers(change: Callable[[gpt.GPTModelConfig, ModuleSpec], ModuleSpec]) -> None:
    """Replaces the transformer layer inside every multi-token prediction layer by ``change(model_config, spec)``.

    ``gpt.mtp_block_spec``, looked up when called (models/gpt.py:264), makes layers of its own and does not look at
    the model's transformer_layer_spec: they would silently keep Megatron's router.
    """
    original = getattr(gpt.mtp_block_spec, "original", gpt.mtp_block_spec)

    def mtp_block_spec(model_config, *args, **kwargs):
        block = original(model_config, *args, **kwargs)
        if block is None:
            return None
        return dataclasses.replace(block, layer_specs=[changed(model_config, spec) for spec in block.layer_specs])

    def changed(model_config: gpt.GPTModelConfig, spec: ModuleSpec) -> ModuleSpec:
        layer = change(model_config, spec.submodules.mtp_model_layer)
        return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, mtp_model_layer=layer))

    mtp_block_spec.original = original
    gpt.mtp_block_spec = mtp_block_spec


def observe_training_log(observer: Callable[..., None]) -> None:
    """Calls ``observer(loss_dict, learning_rate, iteration, skipped_iter, grad_norm)`` on every rank each iteration.

    The training loop has no callback; ``training.training_log`` is looked up when called (training.py:3980).
    """
    original = getattr(training.training_log, "original", training.training_log)
    signature = inspect.signature(original)

    def training_log(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        names = ("loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm")
        observer(**{name: call[name] for name in names})
        return original(*args, **kwargs)

    training_log.original = original
    training.training_log = training_log


def observe_evaluations(wanted: Callable[[str, int], bool], observer: Callable[..., None]) -> None:
    """Calls ``observer(split, index, iteration, losses, seconds)`` on every rank after each set that is evaluated.

    Args:
        wanted: asked on every rank with (split, iteration) before each evaluation; False leaves it out.
        observer: ``split`` is "valid" or "test", ``index`` numbers the validation sets, ``losses`` is a mean for each
            name, empty where this rank is not on the last stage.

    The training loop tells nobody what it found: ``training.evaluate_and_print_results`` (training.py:4054, 1480 and
    1496) prints it, ``training.evaluate``, called there for each set (training.py:4395), returns it; both are looked
    up when called. The test split would go to TensorBoard as a point of the validation curve: it does not.
    """
    original = getattr(training.evaluate_and_print_results, "original", training.evaluate_and_print_results)
    evaluate = training.evaluate
    signature = inspect.signature(original)

    def evaluate_and_print_results(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        split = "test" if call.arguments["prefix"].endswith("on test set") else "valid"
        iteration = call.arguments["iteration"]
        if not wanted(split, iteration):
            return
        if split == "test":
            call.arguments["write_to_tensorboard"] = False
        found = []

        def evaluate_and_keep(*args, **kwargs):
            started = time.perf_counter()
            result = evaluate(*args, **kwargs)
            found.append((result[0], time.perf_counter() - started))
            return result

        training.evaluate = evaluate_and_keep
        try:
            original(*call.args, **call.kwargs)
        finally:
            training.evaluate = evaluate
        for index, (losses, seconds) in enumerate(found):
            if losses is not None:  # None: --exit-duration-in-mins ended it
                observer(split, index, iteration, losses, seconds)

    evaluate_and_print_results.original = original
    training.evaluate_and_print_results = evaluate_and_print_results
