"""Every place where the adapter replaces a name inside Megatron, with the reason. All of them are idempotent."""

import inspect
from collections.abc import Callable

from megatron.core.pipeline_parallel import schedules
from megatron.training import training


def use_p2p_communicator(communicator: type) -> None:
    """Both pipeline schedules build ``schedules.P2PCommunicator``, looked up when called; they offer no argument for
    another message width (schedules.py:1157 and 2116 take config.hidden_size), and pretrain(p2p_communicator=)
    wants process groups that exist only later."""
    schedules.P2PCommunicator = communicator


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
