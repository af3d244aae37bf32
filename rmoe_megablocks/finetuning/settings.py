"""What a fine-tuning does, as asked for and as the folder decides: what --resume must find unchanged."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from rmoe_megablocks.conversion.folder.checksums import CHECKSUMS, sha256
from rmoe_megablocks.errors import UsageError

FILE = "arguments.json"
CHECKPOINTS = "checkpoints"
_SEQ_LENGTH, _MICRO_BATCH = 512, 4
#: of the command line, beside data and model; what may change at a --resume is not among them
_NAMES = (
    *("epochs", "max_steps", "lr", "warmup_ratio", "weight_decay", "global_batch_size", "seq_length", "aux_loss"),
    *("freeze_router", "seed", "dtype"),
)


def complete(args: argparse.Namespace, config: Any) -> None:
    """Fills in what the command line leaves to the folder and the machine. Raises UsageError for what does not go."""
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if args.seq_length is None:
        args.seq_length = min(_SEQ_LENGTH, longest or _SEQ_LENGTH)
    elif longest and args.seq_length > longest:
        raise UsageError(f"--seq-length {args.seq_length}: the model has been made for {longest}")
    if args.aux_loss is None:
        args.aux_loss = 0.0 if args.freeze_router or not routes(config) else float(config.router_aux_loss_coef)
    elif args.aux_loss and not routes(config):
        raise UsageError(f"--aux-loss {args.aux_loss:g}: {args.model} has no load-balancing loss ({config.model_type})")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.global_batch_size % processes:
        raise UsageError(f"--global-batch-size {args.global_batch_size}: expected a multiple of {processes} processes")
    rows = args.global_batch_size // processes
    if args.micro_batch_size is None:
        args.micro_batch_size = next(size for size in range(_MICRO_BATCH, 0, -1) if rows % size == 0)
    if rows % args.micro_batch_size:
        raise UsageError(
            f"--global-batch-size {args.global_batch_size}: expected a multiple of --micro-batch-size "
            f"{args.micro_batch_size} times {processes} process{'es' * (processes > 1)}"
        )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    args.dtype = args.dtype or ("bfloat16" if has_bf16 else "float32")


def is_ours(config: Any) -> bool:
    """Whether a configuration is RmoeConfig's, or that of a folder's copy of it."""
    return hasattr(config, "router_aux_loss_reduction") and hasattr(config, "moe_layer_freq")


def routes(config: Any) -> bool:
    """Whether a model of this configuration has a load-balancing loss."""
    if is_ours(config):
        return any(config.moe_layer_freq)
    return hasattr(config, "router_aux_loss_coef") and hasattr(config, "output_router_logits")


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as arguments.json has them."""
    sums = args.model / CHECKSUMS
    model = sha256(sums if sums.is_file() else args.model / "config.json")
    data = hashlib.sha256(args.data.read_bytes()).hexdigest()
    files = {"model": args.model.name, "model_sha256": model, "data": args.data.name, "data_sha256": data}
    return files | {name: getattr(args, name) for name in _NAMES}


def check_same(path: Path, asked: dict[str, Any]) -> None:
    """Raises UsageError where an interrupted fine-tuning was another one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: {path} cannot be read ({error}): remove the folder, and begin again") from None
    for name, value in asked.items():
        if found.get(name) != value and name not in ("model", "data"):
            what = {"model_sha256": "FOLDER", "data_sha256": "--data"}.get(name, "--" + name.replace("_", "-"))
            told = "is another one" if name.endswith("sha256") else f"is {value}, and was {found.get(name)}"
            raise UsageError(f"--resume: {what} {told} when it began: leave that as it was, or name a new --out")


def newest_checkpoint(folder: Path) -> Path | None:
    """The last one that is whole: the Trainer writes its state last."""
    by_step = {}
    for path in folder.glob("checkpoint-*"):
        try:
            by_step[json.loads((path / "trainer_state.json").read_bytes())["global_step"]] = path
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return by_step[max(by_step)] if by_step else None


def of_trl(args: argparse.Namespace, folder: Path, theirs: float) -> SFTConfig:
    """TRL's configuration.

    Args:
        args: completed.
        folder: to write checkpoints into.
        theirs: coefficient of TRL's own load-balancing loss.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=os.fspath(folder),
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // args.micro_batch_size // processes,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        optim="adamw_torch",
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_ratio,  # below 1: a share
        weight_decay=args.weight_decay,
        bf16=args.dtype == "bfloat16",
        fp16=False,
        use_cpu=not on_gpu,
        # named for one process, it would have accelerate look for the others
        ddp_backend=None if processes == 1 else "nccl" if on_gpu else "gloo",
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=args.gradient_checkpointing,
        # reentrant, router logits would have no gradient, and the loss would not say so
        gradient_checkpointing_kwargs={"use_reentrant": False},
        router_aux_loss_coef=theirs,
        average_tokens_across_devices=True,
        max_length=None,  # rows are cut already, with their labels
        packing=False,  # packed rows would see each other
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=args.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would tell the mean of earlier losses in the place of one that is not finite
        save_strategy="steps",
        save_steps=args.save_interval,
        save_total_limit=1,  # the last one goes when a newer is whole
        report_to="none",
        disable_tqdm=True,
    )
