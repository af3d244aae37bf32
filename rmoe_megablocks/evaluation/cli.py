"""The command ``rmoe eval``."""

import argparse
import importlib.util
from pathlib import Path

from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import report
from rmoe_megablocks.evaluation.tasks import arguments


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    parser = subparsers.add_parser(
        "eval",
        help="how well a model predicts a text, exactly, or answers the questions of tasks",
        description="Bits per byte and character, perplexity of tokens and words, of a whole text: every token but the "
        "first is predicted once. Or, with --tasks, accuracies of lm-evaluation-harness. MODEL is a Hugging Face "
        "folder, of rmoe export or of any causal language model; for a text it may be a checkpoint of a run, which "
        "Megatron evaluates in any layout: further arguments, as --pipeline-model-parallel-size 2, go to the launcher.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a Hugging Face folder, or a folder of checkpoints")
    add("--data", metavar="WHAT", type=Path, help="a text file, or a folder of rmoe data prepare")
    add("--split", choices=SPLITS, help="of such a folder (default: test)")
    add(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens of a window (default: the most that the model has been made for)",
    )
    add("--stride", type=int, metavar="N", help="between windows (default: --seq-length, as the end of a training run)")
    add("--eval-tokens", type=int, metavar="N", help="the first N predicted tokens alone; the result says so")
    add("--json", type=Path, metavar="FILE", help="write the result there, too")
    add("--micro-batch-size", type=int, metavar="N", help="windows at once in a process (default: 4)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: float32)")
    add("--device", help="as cpu or cuda:1 (default: a GPU if there is one)")
    add("--tokenizer-model", type=Path, metavar="FILE", help="the SentencePiece model that a dataset was made with")
    add_trust(add)
    arguments.add_arguments(parser)


def add_trust(add) -> None:
    """The two arguments that let code of a folder run."""
    add("--trust-remote-code", action="store_true", help="run the code that the folder brings along")
    add("--trust-router-code", action="store_true", help="import the module of a router type module:Class")


def need(package: str) -> None:
    """Raises UsageError where ``package`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{package} is not installed: pip install 'rmoe-megablocks[hf]'")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for a number that is none."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments; 0, or 130 for a partial result. Raises UsageError, one line."""
    arguments.check(args)
    at_least_one(args, "seq_length", "stride", "eval_tokens", "micro_batch_size")
    report.check_json(args.json)
    if not args.model.is_dir():
        raise UsageError(f"{args.model}: no such folder")
    if args.tasks is not None:
        from rmoe_megablocks.evaluation.tasks import starting

        return starting.run(args)
    if args.split and args.data.exists() and not args.data.is_dir():
        raise UsageError(f"--split {args.split}: {args.data} is a file, all of which is read")
    if not (args.model / "config.json").is_file():
        from rmoe_megablocks.evaluation import checkpoints

        return checkpoints.run(args)
    if args.megatron_arguments:
        raise UsageError("unrecognized arguments for a Hugging Face folder: " + " ".join(args.megatron_arguments))
    need("transformers")
    need("safetensors")
    from rmoe_megablocks.evaluation import folders

    try:
        return folders.run(args)
    except KeyboardInterrupt:  # before the first window, or a second one
        return 130
