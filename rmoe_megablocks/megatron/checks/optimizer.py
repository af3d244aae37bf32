"""Options of the optimizer, its schedules and its precision that Megatron takes, and that do not do what they say."""

import argparse
from collections.abc import Iterator


def contradictions(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """(whether it applies, the line that refuses it)."""
    yield (
        args.init_method_xavier_uniform,
        "--init-method-xavier-uniform: Megatron-Core 0.19 makes no configuration with it (argument_utils.py:376); use "
        "--init-method-std",
    )
    yield (
        args.fp32_residual_connection and (args.fp16 or args.bf16) and args.transformer_impl == "local",
        "--fp32-residual-connection needs Transformer Engine, whose layers take another precision: leave it out",
    )
    yield (
        args.layernorm_zero_centered_gamma and args.transformer_impl == "local",
        "--apply-layernorm-1p needs Transformer Engine's or Apex's norms: leave it out",
    )
    yield (
        args.fp16 and not args.loss_scale and args.min_loss_scale > args.initial_loss_scale,
        f"--min-loss-scale {args.min_loss_scale} is above --initial-loss-scale {args.initial_loss_scale}",
    )
    if not args.skip_train:
        yield from _schedules(args)


def _schedules(args: argparse.Namespace) -> Iterator[tuple[object, str]]:
    """Learning rates that would rise where they are said to decay, and decays that begin before the run."""
    samples = args.train_samples
    yield (
        samples and not args.step_batch_size_schedule and samples < (args.global_batch_size or 1),
        f"--train-samples {samples}: not one batch of --global-batch-size {args.global_batch_size}",
    )
    decay = args.lr_decay_samples or samples
    yield (
        args.lr_warmup_samples and decay and args.lr_warmup_samples >= decay,
        f"--lr-warmup-samples {args.lr_warmup_samples} must be below --lr-decay-samples or --train-samples ({decay}); "
        "use --lr-warmup-fraction for runs of any length",
    )
    low = args.min_lr if args.decoupled_min_lr is None else args.decoupled_min_lr
    option = "--min-lr" if args.decoupled_min_lr is None else "--decoupled-min-lr"
    yield (
        args.decoupled_lr is not None and low > args.decoupled_lr,
        f"--decoupled-lr {args.decoupled_lr} is below {option} {low}, where it decays to: set --decoupled-min-lr",
    )
    if args.lr_decay_style == "WSD":
        unit = "samples" if args.train_samples else "iters"
        whole = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_wsd_decay_{unit}")
        yield (
            decay and whole and decay > whole,
            f"--lr-wsd-decay-{unit} {decay}: the decay at the end is longer than the run (--lr-decay-{unit} or "
            f"--train-{unit}, {whole})",
        )
