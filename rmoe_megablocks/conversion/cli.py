"""The commands ``rmoe export`` and ``rmoe import``."""

import argparse
import sys
import warnings
from pathlib import Path

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import quiet_logging


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    out = subparsers.add_parser(
        "export",
        help="turn a checkpoint into a Hugging Face folder",
        description="Turn a torch_dist checkpoint of any layout, precision and backend into a Hugging Face folder. "
        "After a kill the same command goes on behind the last complete file.",
        allow_abbrev=False,
    )
    add = out.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or the folder above with its tracker file")
    add("folder", metavar="FOLDER", type=Path, help="the new folder")
    add("--ckpt-step", type=int, metavar="N", help="the checkpoint of this iteration (default: what the tracker names)")
    add("--max-shard-size", default="4GB", metavar="SIZE", help="largest file of weights, and memory (default: 4GB)")
    add(
        "--tokenizer",
        metavar="WHAT",
        help="bytes, a SentencePiece model, a folder of Hugging Face's, or none (default: the run's)",
    )
    add(
        "--layout",
        choices=("rmoe", "llama_moe_rnn"),
        default="rmoe",
        help="llama_moe_rnn: names and parts of the paper's released model, of gru, rnn and linear routers "
        "(default: rmoe)",
    )
    add("--run", type=Path, metavar="DIR", help="the run's folder, for the model card (default: beside the checkpoint)")
    add("--no-verify", dest="verify", action="store_false", help="do not compare logits with Megatron's")
    _trust(add)
    back = subparsers.add_parser(
        "import",
        help="turn a Hugging Face folder into a checkpoint",
        description="Turn a folder that rmoe export wrote, or a fine-tuned one of the same model, into a torch_dist "
        "checkpoint for --load with --finetune.",
        allow_abbrev=False,
    )
    add = back.add_argument
    add("folder", metavar="FOLDER", type=Path, help="the model's folder")
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="the new folder of checkpoints, which --load names")
    add(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default="local",
        help="of the run that will load it: with experts one key has another name (default: local)",
    )
    add(
        "--split-ffn",
        type=int,
        metavar="E",
        help="FOLDER is a dense Llama-style model: cut its feed-forward layers into E experts, with a fresh router "
        "(--moe-router-type and its arguments, as for a run)",
    )
    add("--split-topk", type=int, metavar="K", help="experts a token (default: 2)")
    add("--split-method", choices=("random", "clustering"), help="which neurons go together (default: random)")
    add("--split-scale", type=float, metavar="X", help="what the experts' outputs are multiplied by (default: E/K)")
    add("--seed", type=int, help="of the split and the router's weights (default: 0)")
    _trust(add)


def _trust(add) -> None:
    add("--trust-router-code", action="store_true", help="import the module of a router type module:Class")


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments; 0, or 130 after Ctrl-C. Raises UsageError with one line for bad input."""
    _need("safetensors")
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's about packages that nothing here needs
        from rmoe_megablocks.compat import megatron_cpu  # late: all that follows imports torch

        megatron_cpu.install(announce=False)  # no process group, nothing runs on a device
        from safetensors import SafetensorError

        from rmoe_megablocks.conversion import storage

        target = args.folder if args.command == "export" else args.checkpoint
        try:
            with storage.in_one_line(target, SafetensorError):
                lines = _export(args) if args.command == "export" else _import(args)
        except KeyboardInterrupt:
            print(f"rmoe: stopped; {target} was not written", file=sys.stderr)
            return 130
    for line in lines:
        print(line)
    return 0


def _export(args: argparse.Namespace) -> list[str]:
    from rmoe_megablocks.conversion.exporting import Options, export
    from rmoe_megablocks.conversion.folder.shards import read_size

    try:
        largest = read_size(args.max_shard_size)
    except ValueError as error:
        raise UsageError(f"--max-shard-size: {error}") from None
    if args.ckpt_step is not None and args.ckpt_step < 1:
        raise UsageError(f"--ckpt-step {args.ckpt_step}: expected an iteration of at least 1")
    if args.run is not None and not args.run.is_dir():
        raise UsageError(f"--run {args.run}: no such folder")
    if args.tokenizer != "none":
        _need("transformers")
    options = Options(
        args.ckpt_step, largest, args.tokenizer, args.run, args.verify, args.trust_router_code, args.layout
    )
    return export(args.checkpoint, args.folder, options)


def _import(args: argparse.Namespace) -> list[str]:
    from rmoe_megablocks.conversion.dense import options
    from rmoe_megablocks.conversion.importing import import_folder

    engine = args.transformer_impl == "transformer_engine"
    return import_folder(args.folder, args.checkpoint, engine, args.trust_router_code, options.read(args))


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{package} is not installed: pip install 'rmoe-megablocks[hf]'")
