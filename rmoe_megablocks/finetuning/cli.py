"""The command ``rmoe finetune``."""

import argparse
import importlib.util
import os
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.cli import add_trust, at_least_one
from rmoe_megablocks.process import report_from_rank

_PACKAGES = ("transformers", "safetensors", "trl", "accelerate", "datasets")


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    parser = subparsers.add_parser(
        "finetune",
        help="train a Hugging Face folder on instructions and answers",
        description="Supervised fine-tuning with TRL: the loss is that of the responses alone. The defaults are the "
        "recipe of the paper's Alpaca runs. Several GPUs: torchrun --nproc-per-node N -m rmoe_megablocks.cli finetune.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="FOLDER", type=Path, help="a Hugging Face folder, of rmoe export or of any causal model")
    add(
        "--data",
        metavar="FILE",
        type=Path,
        required=True,
        help="JSON or JSON lines, also compressed: instruction, input, output (Alpaca); or messages of role, content",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="the new folder, of the same kind")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add("--epochs", type=float, metavar="X", default=3.0, help="(default: 3)")
    add("--max-steps", type=int, metavar="N", help="end after so many; the schedule is theirs (default: --epochs)")
    add("--lr", type=float, metavar="X", default=2e-5, help="highest learning rate of AdamW (default: 2e-5)")
    add("--warmup-ratio", type=float, metavar="X", default=0.03, help="share of the steps (default: 0.03)")
    add("--weight-decay", type=float, metavar="X", default=0.0, help="(default: 0)")
    add("--global-batch-size", type=int, metavar="N", default=128, help="rows of a step (default: 128)")
    add("--micro-batch-size", type=int, metavar="N", help="rows at once in a process (default: up to 4)")
    add("--seq-length", type=int, metavar="N", help="longest row (default: 512, or the model's positions if fewer)")
    add("--freeze-router", action="store_true", help="leave all that routes as it is")
    add(
        "--aux-loss",
        type=float,
        metavar="X",
        help="coefficient of the load-balancing loss (default: the folder's router_aux_loss_coef; 0 with "
        "--freeze-router)",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--save-interval", type=int, metavar="N", default=200, help="steps between checkpoints (default: 200)")
    add("--seed", type=int, default=0, help="of the rows' order (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: bfloat16 on GPUs that have it)")
    add_trust(add)


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments; 0, or 130 for one that --resume goes on with. Raises UsageError."""
    try:
        return _run(args)
    except UsageError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        report_from_rank(error)  # one line for all processes
        return 2


def _run(args: argparse.Namespace) -> int:
    at_least_one(args, "max_steps", "global_batch_size", "micro_batch_size", "seq_length", "save_interval")
    for name in ("epochs", "lr"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(args, name):g}: expected more than 0")
    for name, most in (("aux_loss", float("inf")), ("weight_decay", float("inf")), ("warmup_ratio", 1.0)):
        value = getattr(args, name)
        if value is not None and not 0 <= value < most:
            limit = f" and less than {most:g}" if most == 1 else ""
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected at least 0{limit}")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed}: expected 0 or more, less than 2**32")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install 'rmoe-megablocks[finetune]'")
    from rmoe_megablocks.finetuning import running

    try:
        return running.run(args)
    except KeyboardInterrupt:
        return 130
