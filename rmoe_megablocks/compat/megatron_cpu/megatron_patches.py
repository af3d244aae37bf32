"""The places of Megatron itself that CPU mode changes. Line numbers are those of Megatron-Core 0.19.2."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from rmoe_megablocks.compat.megatron_cpu import dataset_helper
from rmoe_megablocks.compat.megatron_cpu.fused_adam import FusedAdam


def _replace(module_name: str, name: str, replacement: Any) -> None:
    """Set an attribute of a module, and of every Megatron module that already imported it by name."""
    original = getattr(sys.modules[module_name], name)
    for key, module in list(sys.modules.items()):
        if key.startswith("megatron.") and getattr(module, name, None) is original:
            setattr(module, name, replacement)


def _patch_optimizers() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    # The fallback to torch's AdamW loses the step count on resuming; see fused_adam (optimizer/__init__.py:13,
    # distrib_optimizer.py:20). The flags say that the optimizer is Apex's.
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True

    # In fp32 the shards are views of parameters that require gradients, and copying a checkpoint into them is an
    # in-place change of a leaf (distrib_optimizer.py:1225).
    cls = distrib_optimizer.DistributedOptimizer
    cls.load_state_dict = torch.no_grad()(cls.load_state_dict)


def _patch_torch_norm() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # The wrapper refuses sequence parallelism (torch_norm.py:50), because it does not mark the weights whose
    # gradients finalize_model_grads has to sum over the tensor-parallel group. Marked, they are right.
    original = WrappedTorchNorm.__new__

    @functools.wraps(original)
    def __new__(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = original(cls, config, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = staticmethod(__new__)


def _patch_maybe_move_tensor_to_cpu() -> None:
    from megatron.core.transformer.moe import moe_utils

    original = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        # The original gives numpy arrays for tensors of a GPU only (moe_utils.py:1184); the alltoall dispatcher needs
        # them for its splits.
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    _replace(moe_utils.__name__, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)


def _patch_compile_helpers() -> None:
    from megatron.core.datasets import utils

    dataset_helper.install()

    def compile_helpers():
        # Runs make in the package and exits if that fails (datasets/utils.py:20).
        if not dataset_helper.is_there():
            dataset_helper.compile_into(Path(utils.__file__).resolve().parent)

    _replace(utils.__name__, "compile_helpers", compile_helpers)


def _patch_checkpoint_writer() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # The writer runs beside training, and relies on tensor.to("cpu") having copied the weights
    # (filesystem_async.py:243). On the CPU that gives the weights themselves, which training goes on changing.
    cls = filesystem_async.FileSystemWriterAsync
    original = cls.preload_tensors

    @functools.wraps(original)
    def preload_tensors(write_buckets, non_blocking=True):
        buckets = [
            (file_name, key, (bytes_data, [(item, tensor.clone()) for item, tensor in tensor_data]))
            for file_name, key, (bytes_data, tensor_data) in write_buckets
        ]
        return original(buckets, non_blocking)

    cls.preload_tensors = staticmethod(preload_tensors)

    if sys.platform == "linux":
        # The queue to the writer lives in a process of its own. It is spawned for the sake of CUDA, which does not
        # survive a fork, and then imports the whole program again: seconds per process (filesystem_async.py:53).
        # The default is that of the function behind its decorator.
        inspect.unwrap(filesystem_async.get_write_results_queue).__defaults__ = ("fork",)


def _patch_norm_recompute() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    # Asked for without fp8 it takes itself to be in fp8 and calls Transformer Engine (random.py:739, 693), so
    # --recompute-modules layernorm ends in a NameError. 0.20 has further arguments.
    original = CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def __init__(self, fp8=None, **kwargs):
        original(self, fp8=fp8, **kwargs)

    CheckpointWithoutOutput.__init__ = __init__


def _patch_attention() -> None:
    # Upstream's own attention refuses context parallelism (dot_product_attention.py:57).
    from rmoe_megablocks.compat.megatron_cpu import context_parallel

    _replace(
        context_parallel.DotProductAttention.__module__,
        "DotProductAttention",
        context_parallel.ContextParallelAttention,
    )


def _patch_inference_layers() -> None:
    from megatron.core.tensor_parallel import inference_layers

    # Multi-token prediction of Megatron 0.20 asks whether a layer is of a class that is no class without Transformer
    # Engine (inference_layers.py:564 of main): a TypeError.
    if hasattr(inference_layers, _ASKS) and not isinstance(inference_layers.InferenceColumnParallelLinear, type):
        _replace(inference_layers.__name__, _ASKS, lambda module: False)


_ASKS = "is_inference_column_parallel_linear"


def _ignore_warnings() -> None:
    # Both are expected here, and each process repeats them: no fused kernels (the optimizer is not even torch's, as the
    # first one says), and no memory to pin.
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")


def install() -> None:
    """Import the modules of Megatron that need changes, and change them."""
    _ignore_warnings()
    _patch_optimizers()
    _patch_torch_norm()
    _patch_maybe_move_tensor_to_cpu()
    _patch_compile_helpers()
    _patch_checkpoint_writer()
    _patch_norm_recompute()
    _patch_inference_layers()
    _patch_attention()
