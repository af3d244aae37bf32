"""Every place where the adapter replaces a name inside Megatron, with the reason. All of them are idempotent."""

import dataclasses
import inspect
from collections.abc import Callable

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import training
from megatron.training.models import gpt


def use_p2p_communicator(communicator: type) -> None:
    """Both pipeline schedules build ``schedules.P2PCommunicator``, looked up when called; they offer no argument for
    another message width (schedules.py:1157 and 2116 take config.hidden_size), and pretrain(p2p_communicator=)
    wants process groups that exist only later."""
    schedules.P2PCommunicator = communicator


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
