"""The command ``rmoe analyze``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rmoe_megablocks.analysis.measuring import arguments as measuring
from rmoe_megablocks.analysis.report import arguments as report
from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.evaluation.cli import add_trust, at_least_one


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    parser = subparsers.add_parser(
        "analyze",
        help="what a model's routers do on a text",
        description="Record which experts a model's routers choose for each token of a text, with scores and states, "
        "and measure that. MODEL is a Hugging Face folder, of rmoe export or of another mixture of experts; a folder "
        "of checkpoints, which Megatron runs in any layout (further arguments, as --pipeline-model-parallel-size 2, go "
        "to the launcher); a recording made before; or a routing trace of Megatron-Core (a .jsonl file).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", metavar="MODEL", type=Path, nargs="+", help="as above; several are recorded and measured each")
    add("--data", metavar="[LABEL=]WHAT", action="append", help="a text file, or a folder of rmoe data prepare; may be "
        "given several times, the label is each token's domain")  # fmt: skip
    add("--tokens", type=int, metavar="N", help="of each text the first N (default: all)")
    add("--out", type=Path, metavar="DIR", help="recordings go to DIR/NAME")
    add("--steps", metavar="all|N,N", help="of a folder of checkpoints: which (default: the latest)")
    add("--write-trace", type=Path, metavar="FILE", help="the recording also as Megatron-Core's routing trace")
    add("--no-measures", action="store_true", help="record alone")
    group = parser.add_argument_group("recording")
    add = group.add_argument
    add("--split", choices=SPLITS, help="of a folder of rmoe data prepare (default: test)")
    add("--seq-length", type=int, metavar="N", help="tokens of a window (default: the most that the model takes)")
    add("--micro-batch-size", type=int, metavar="N", help="windows at once (default: 4)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to compute in (default: float32)")
    add("--device", help="as cpu or cuda:1 (default: a GPU if there is one)")
    add("--tokenizer-model", type=Path, metavar="FILE", help="the SentencePiece model that a dataset was made with")
    add_trust(add)
    measuring.add_arguments(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments; 0, or 130 for a partial recording. Raises UsageError, one line."""
    at_least_one(args, "tokens", "seq_length", "micro_batch_size")
    from rmoe_megablocks.analysis.recording import about, command

    about.need("pyarrow")
    try:
        return command.run(args)
    except about.ToldAlready as error:
        return error.code
    except KeyboardInterrupt:
        return 130
