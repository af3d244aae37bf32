"""Arguments of loading and saving that would be overridden, ignored or run into an error: refused by name.

Megatron's parser takes them in any combination. Which checkpoint is loaded is decided by :mod:`.files`, and what the
others do was tried (docs/odd-inputs.md): each of them works with a test, or is here with the reason.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from typing import Any

from rmoe_megablocks.errors import UsageError

_SECOND_KIND = (
    "a restart would have to choose between two kinds of checkpoints, and Megatron's choice goes by the iteration "
    "alone; use a smaller --save-interval, and --save-retain-interval to keep few"
)
_REFUSED = {
    "--non-persistent-save-interval": _SECOND_KIND,
    "--non-persistent-ckpt-type": _SECOND_KIND,
    "--non-persistent-global-ckpt-dir": _SECOND_KIND,
    "--non-persistent-local-ckpt-dir": _SECOND_KIND,
    "--non-persistent-local-ckpt-algo": _SECOND_KIND,
    "--replication": "it copies checkpoints of --non-persistent-ckpt-type local, which this entry does not save",
    "--replication-jump": "it is about --replication, which this entry does not do",
    "--replication-factor": "it is about --replication, which this entry does not do",
    "--use-mp-args-from-checkpoint-args": "it is about --use-checkpoint-args; write the layout out",
    "--no-use-tokenizer-model-from-checkpoint-args": "it is about --use-checkpoint-args; nothing is taken from there",
    "--disable-use-tokenizer-model-from-checkpoint-args": "it is about --use-checkpoint-args; nothing is taken from "
    "there",
    "--override-ckpt-iteration": "the run's files and checkpoints go by the true iteration; go back with --ckpt-step, "
    "or start at 0 with --finetune",
    "--auto-detect-ckpt-format": "--ckpt-format torch_dist, the default, loads both formats without it, and torch "
    "cannot load torch_dist with it either",
    "--ckpt-convert-update-legacy-dist-opt-format": "it is about --ckpt-format torch with --use-distributed-optimizer",
}
# what an option is about -> the options that do nothing without it
_ABOUT = {
    "--async-save": (
        *("--async-strategy", "--async-ckpt-cpu-priority", "--async-ckpt-io-priority", "--async-ckpt-use-cpu-shm"),
        "--use-persistent-ckpt-worker",
    ),
    "--ckpt-fully-parallel-load": (
        "--ckpt-fully-parallel-load-exchange-algo",
        "--ckpt-fully-parallel-load-process-group",
    ),
    "--ckpt-convert-format": ("--ckpt-convert-save",),
    "--ckpt-format fsdp_dtensor": ("--no-strict-fsdp-dtensor-load", "--disable-strict-fsdp-dtensor-load"),
    "--fp8-format": ("--no-stream-ckpt-dequant", "--disable-stream-ckpt-dequant"),
    "--dist-ckpt-optim-fully-reshardable": ("--distrib-optim-fully-reshardable-mem-efficient",),
    "--async-save with --ckpt-assume-constant-structure": ("--dist-ckpt-workers",),
    "--fp16 or --bf16": ("--load-main-params-from-ckpt",),
}
_OF_TORCH_DIST = (
    *("--verify-integrity", "--async-save", "--ckpt-assume-constant-structure", "--ckpt-fully-parallel-load"),
    *("--ckpt-fully-parallel-save-process-group", "--no-ckpt-fully-parallel-save", "--dist-ckpt-strictness"),
    *("--dist-ckpt-optim-fully-reshardable", "--no-ckpt-load-validate-sharding-integrity"),
    "--disable-ckpt-load-validate-sharding-integrity",
)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError with one line for the first of them. ``args`` are not validated yet."""
    for option, reason in _REFUSED.items():
        if option in args.explicit:
            raise UsageError(f"{option} does not work here: {reason}")
    for refused, text in _contradictions(args):
        if refused:
            raise UsageError(text)
    for needed, options in _ABOUT.items():
        for option in options:
            if option in args.explicit and not _is_given(args, needed):
                raise UsageError(f"{option} does nothing without {needed}: leave it out, or add what it is about")


def _is_given(args: argparse.Namespace, needed: str) -> Any:
    return {
        "--async-save": args.async_save,
        "--ckpt-fully-parallel-load": args.ckpt_fully_parallel_load,
        "--ckpt-convert-format": args.ckpt_convert_format,
        "--ckpt-format fsdp_dtensor": args.ckpt_format == "fsdp_dtensor",
        "--fp8-format": args.fp8,
        "--dist-ckpt-optim-fully-reshardable": args.dist_ckpt_optim_fully_reshardable,
        "--async-save with --ckpt-assume-constant-structure": args.async_save and args.ckpt_assume_constant_structure,
        "--fp16 or --bf16": args.fp16 or args.bf16,
    }[needed]


def _contradictions(args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    nowhere = args.no_checkpoints and args.load is None and args.pretrained_checkpoint is None
    yield args.ckpt_step == 0, "--ckpt-step 0: no checkpoint has that iteration; leave it out to load the latest"
    yield (
        args.ckpt_step and nowhere,
        f"--ckpt-step {args.ckpt_step} with --no-checkpoints: there is no folder to load from; name it with --load",
    )
    yield (
        args.no_checkpoints and "--save" in args.explicit,
        f"--save {args.save} and --no-checkpoints contradict each other: keep one (--load names what to start from)",
    )
    yield (
        args.ckpt_format in ("torch_dcp", "fsdp_dtensor"),
        f"--ckpt-format {args.ckpt_format} is for FSDP, which this entry does not train with: use torch_dist",
    )
    yield (
        args.ckpt_format == "torch" and args.use_distributed_optimizer,
        "--ckpt-format torch with --use-distributed-optimizer: Megatron-Core 0.19 cannot load the optimizer's state "
        "again; use --ckpt-format torch_dist",
    )
    yield (
        args.dist_ckpt_strictness.startswith("return_"),
        f"--dist-ckpt-strictness {args.dist_ckpt_strictness}: Megatron-Core 0.19 does not take what it returns, and "
        "cannot load; use log_all or raise_all",
    )
    for option in _OF_TORCH_DIST if args.ckpt_format == "torch" else ():
        yield (
            option in args.explicit,
            f"{option} does nothing with --ckpt-format torch: leave it out, or use --ckpt-format torch_dist",
        )
    yield (
        "--ckpt-fully-parallel-save-process-group" in args.explicit and not args.ckpt_fully_parallel_save,
        "--ckpt-fully-parallel-save-process-group does nothing with --no-ckpt-fully-parallel-save: keep one of them",
    )
    yield (
        args.async_ckpt_use_cpu_shm and importlib.util.find_spec("nvidia_resiliency_ext") is None,
        "--async-ckpt-use-cpu-shm needs the package nvidia-resiliency-ext, which is not installed; leave it out",
    )
