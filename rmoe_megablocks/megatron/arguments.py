"""Our arguments among Megatron's, and the defaults of a run. What is refused before training: :mod:`.refusals`."""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

from rmoe_megablocks.command_line import program_arguments
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron.dead_arguments import refuse_dead_arguments
from rmoe_megablocks.compat.megatron.errors import in_one_line
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron import balancing
from rmoe_megablocks.megatron.checks import values
from rmoe_megablocks.megatron.checks.refusals import check_router_arguments, installed
from rmoe_megablocks.megatron.command_line import parser, router_arguments
from rmoe_megablocks.megatron.experts import backend
from rmoe_megablocks.megatron.null_experts import options as null_experts

_LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are a little longer


def add_router_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the router's arguments; usable as Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("router")
    router_arguments.add_arguments(group)
    group.add_argument(
        "--moe-router-upcycle",
        action="store_true",
        help="Start a recurrent model from the weights of a linear checkpoint (--load or --pretrained-checkpoint); "
        "routing, optimizer, data and iteration start afresh.",
    )
    null_experts.add_argument(group)
    balancing.add_reduction_argument(group)
    backend.add_backend_argument(parser.add_argument_group("experts"))
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the router's arguments and those of our own entry (:mod:`.pretrain`)."""
    parser = add_router_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--run-name", default="run", help="Name of the run. The launcher names it by configuration and command line."
    )
    group.add_argument(
        "--runs-dir", default="runs", help="Folder of all runs; this one's files go to RUNS_DIR/RUN_NAME."
    )
    group.add_argument(
        "--dataset",
        metavar="DIR",
        help="Folder made by 'rmoe data prepare'. Without any data argument: the embedded excerpt of enwik8.",
    )
    group.add_argument("--no-checkpoints", action="store_true", help="Save none, for measurements and trials.")
    group.add_argument(
        "--no-verify-integrity",
        action="store_true",
        help="Save and load torch_dist checkpoints without hashing their files (see docs/checkpoints.md).",
    )
    group.add_argument(
        "--no-final-evaluation",
        action="store_true",
        help="Leave out the exact evaluation of the validation and test splits that ends a run.",
    )
    group.add_argument(
        "--eval-tokens",
        type=_positive,
        metavar="N",
        help="Evaluate only the first N tokens of each split at the end; the figures are marked as partial.",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: Sequence[str], add_arguments=add_run_arguments) -> argparse.Namespace:
    """Parses ``argv`` with Megatron's parser and ours. Raises UsageError for what neither knows.

    Besides Megatron's arguments the result has ``explicit``, the names in ``argv``, ``argv``, checked (:mod:`.parser`),
    and ``as_config``, the same as a configuration file spells it.
    """
    prepared: list[argparse.ArgumentParser] = []

    def extra_args_provider(megatrons: argparse.ArgumentParser) -> argparse.ArgumentParser:
        own = parser.with_usage_errors(add_arguments(megatrons))
        prepared.append(own)
        sys.argv[1:] = parser.check(argv, own)  # what parse_args parses next
        refuse_dead_arguments(_named_options(sys.argv[1:]))
        return own

    with program_arguments(argv):
        with in_one_line(argparse.Namespace()):
            args = parse_args(extra_args_provider)
        args.argv = sys.argv[1:]
    args.as_config = parser.as_config(args.argv, prepared[0], args)
    args.explicit = _named_options(args.argv)
    values.check_numbers(args)
    return args


def _named_options(argv: Sequence[str]) -> set[str]:
    return {word.split("=", 1)[0] for word in argv if word.startswith("--")}


def validate(args: argparse.Namespace) -> None:
    """Refuses what cannot work, then runs Megatron's own validation. Raises UsageError with one line either way."""
    check_router_arguments(args)
    values.check_together(args)
    said = io.StringIO()
    try:
        with in_one_line(args), contextlib.redirect_stdout(said):
            validate_args(args, {})
            core_transformer_config_from_args(args)  # which checks as well
    except SystemExit as error:  # Megatron's way with a few old options: it says why and exits with code 0
        words = [line for line in said.getvalue().splitlines() if line.strip()]
        raise UsageError(words[-1] if words else "Megatron refuses these arguments") from error
    finally:
        print(said.getvalue(), end="")
    check_router_arguments(args)  # once more: old options mean new ones by now, --enable-cuda-graph --cuda-graph-impl


def fill_defaults(args: argparse.Namespace) -> list[str]:
    """Chooses what this machine can run where the user did not say. Returns a line for each choice worth telling."""
    told = []
    if args.transformer_impl == "transformer_engine" and not installed("transformer_engine"):
        if "--transformer-impl" in args.explicit:
            raise UsageError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed; leave the argument out"
            )
        args.transformer_impl = "local"
        told.append("Transformer Engine is not installed: --transformer-impl local")
    if args.transformer_impl == "local":
        args.attention_backend = AttnBackend.unfused
        args.apply_rope_fusion = False
    if not installed("fused_layer_norm_cuda"):  # NVIDIA's Apex; PyPI's apex is something else
        args.no_persist_layer_norm = True
    if not installed("fused_weight_gradient_mlp_cuda"):
        args.gradient_accumulation_fusion = False
    if not installed("scaled_upper_triang_masked_softmax_cuda"):
        args.masked_softmax_fusion = False
    if megatron_cpu.active():
        args.distributed_backend = "gloo"
    if args.expert_tensor_parallel_size is None:  # Megatron's default, or 1 for experts that cannot be split
        args.expert_tensor_parallel_size = backend.expert_tensor_size(args)
    if not (args.reset_attention_mask or "--create-attention-mask-in-dataloader" in args.explicit):
        args.create_attention_mask_in_dataloader = False  # attention is causal anyway
    if args.async_save and args.async_strategy == "nvrx" and not installed("nvidia_resiliency_ext"):
        if "--async-strategy" in args.explicit:
            raise UsageError(
                "--async-strategy nvrx: nvidia-resiliency-ext is not installed; use --async-strategy mcore"
            )
        args.async_strategy = "mcore"
        told.append("nvidia-resiliency-ext is not installed: --async-strategy mcore")
    if args.async_save and not args.use_persistent_ckpt_worker:  # or Megatron would save synchronously, not saying so
        args.use_persistent_ckpt_worker = True
        told.append("--async-save saves in a process of its own: --use-persistent-ckpt-worker")
    if "--no-exit-signal-handler" not in args.explicit:
        args.exit_signal_handler = True  # Ctrl-C and SIGTERM save a checkpoint
    return told


def layout_size(args: argparse.Namespace) -> int:
    """Number of processes that one replica of the model takes: TP x PP x CP, or what its experts need if more."""
    dense = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    experts = args.expert_model_parallel_size * backend.expert_tensor_size(args) * args.pipeline_model_parallel_size
    return max(dense, experts)


def check_writable(folder: Path, option: str, make: bool = True) -> None:
    """Makes ``folder`` and proves that files can be made in it, on all ranks at once. Raises UsageError otherwise.

    Without ``make`` the proof is done where ``folder`` would be, and leaves nothing behind.
    """
    place = folder
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        while not os.path.lexists(place):  # a link to nowhere is in the way
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {folder} ({error.strerror})") from error


def check_run_name(name: str) -> None:
    """Refuses what is no folder's name. Raises UsageError."""
    if "/" in name or name in (".", ".."):
        raise UsageError(f"--run-name {name}: expected a name, not a path; --runs-dir names the folder of all runs")
    if name != name.strip() or not name.isprintable():
        raise UsageError(f"--run-name {name!r}: has blanks around it, or characters that cannot be shown")
    if len(name.encode()) > _LONGEST_NAME:
        raise UsageError(f"--run-name {name[:40]}...: has {len(name.encode())} bytes, {_LONGEST_NAME} are the limit")
