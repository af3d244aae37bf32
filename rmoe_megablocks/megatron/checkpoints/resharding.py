"""Changes of layout under which Megatron cannot load an optimizer's state, refused before anything is built.

Weights load under every layout. Of the optimizer's state in --ckpt-format torch_dist, found by saving and loading:

- experts with process groups of their own (expert parallel, or another expert tensor size) have an optimizer of their
  own, and checkpoints of one optimizer and of two do not load into each other, in any format (optimizer.py:1571, 1579);
- the state of the plain and of the distributed optimizer do not load into each other, in any format;
- between fp32 and half precision only the fully reshardable format of the distributed optimizer loads;
- the distributed optimizer's default format follows the gradient buffers (distrib_optimizer.py:1472): another number
  of data-parallel ranks is all that may change. Fully reshardable is made for the rest.
"""

import argparse

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints import compatibility
from rmoe_megablocks.megatron.experts import backend

COSTS = "--no-load-optim to go on with the weights alone, which starts Adam's averages and the learning rate afresh"


def check_optimizer_layout(args: argparse.Namespace) -> None:
    """Refuses a restart whose optimizer state Megatron would fail to load. ``args`` are validated.

    Raises:
        UsageError: one line that names the change and the ways out.
    """
    if args.no_load_optim or args.finetune or args.load is None:
        return
    saved = compatibility.saved_arguments(args.load, args.ckpt_step)
    if saved is None or getattr(saved, "no_save_optim", False) or not (_is_covered(saved) and _is_covered(args)):
        return
    changes = _changes(saved, args)
    if _separate_experts(saved) != _separate_experts(args):
        where = "the checkpoint" if _separate_experts(saved) else "this run"
        raise UsageError(
            f"--load {args.load}: with {changes} experts have an optimizer of their own in {where} alone, and Megatron "
            f"cannot convert the state: keep the layout, or add {COSTS}"
        )
    if saved.use_distributed_optimizer != args.use_distributed_optimizer:
        where = "the checkpoint" if saved.use_distributed_optimizer else "this run"
        raise UsageError(
            f"--load {args.load}: {where} alone has --use-distributed-optimizer, and Megatron cannot convert the "
            f"state: keep it as it was, or add {COSTS}"
        )
    # Older releases, whose arguments do not have it, had formats of their own: theirs to judge.
    reshardable = args.use_distributed_optimizer and getattr(saved, "dist_ckpt_optim_fully_reshardable", True)
    if not reshardable and _is_half(saved) != _is_half(args):
        raise UsageError(
            f"--load {args.load}: the checkpoint is of a run in {_precision(saved)}, this one in {_precision(args)}, "
            f"and Megatron cannot convert the optimizer's state: keep the precision, or add {COSTS}"
        )
    if args.use_distributed_optimizer and not reshardable and changes:
        raise UsageError(
            f"--load {args.load}: the optimizer's state does not fit with {changes}: keep the layout, save once more "
            f"in the old one with --dist-ckpt-optim-fully-reshardable, or add {COSTS}"
        )


def _is_covered(args: argparse.Namespace) -> bool:
    """Whether the optimizer is one whose checkpoints the rules above describe."""
    others = ("use_layer_wise_distributed_optimizer", "use_megatron_fsdp", "use_torch_fsdp2")
    return args.ckpt_format == "torch_dist" and not any(getattr(args, name, False) for name in others)


def _separate_experts(args: argparse.Namespace) -> bool:
    """Megatron's rule for process groups of the experts' own (tensor_parallel/layers.py:961)."""
    return bool(args.num_experts) and (
        args.expert_model_parallel_size > 1 or _expert_tensor_size(args) != args.tensor_model_parallel_size
    )


def _expert_tensor_size(args: argparse.Namespace) -> int:
    return args.expert_tensor_parallel_size or backend.expert_tensor_size(args)


def _is_half(args: argparse.Namespace) -> bool:
    return args.bf16 or args.fp16


def _precision(args: argparse.Namespace) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "virtual pipeline stages": getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
    }
    if args.num_experts:
        sizes["--expert-model-parallel-size"] = args.expert_model_parallel_size
        sizes["--expert-tensor-parallel-size"] = _expert_tensor_size(args)
    return sizes


def _changes(saved: argparse.Namespace, args: argparse.Namespace) -> str:
    sizes = [(name, _sizes(saved).get(name), size) for name, size in _sizes(args).items()]
    return ", ".join(f"{name} {before} -> {now}" for name, before, now in sizes if before != now)
