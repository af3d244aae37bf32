"""The command ``rmoe data``: prepare a dataset, and say what one holds."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rmoe_megablocks.data.build import prepare
from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.prepared.metadata import DatasetMetadata
from rmoe_megablocks.data.reading.formats import AUTO, INPUT_FORMATS
from rmoe_megablocks.data.tokenizers import KINDS


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``data`` with its commands to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    data = subparsers.add_parser(
        "data", help="prepare and inspect datasets", description="Prepare and inspect datasets."
    )
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    prepare_parser = commands.add_parser(
        "prepare",
        help="turn text into Megatron's indexed dataset",
        description="Turn text into Megatron's indexed dataset: train, valid and test in the folder --output.",
    )
    add = prepare_parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="text or JSON files, also compressed; read in this order")
    add("--output", required=True, metavar="DIR", help="the dataset's folder")
    add("--tokenizer", choices=KINDS, default="bytes", help="default: bytes")
    add("--tokenizer-model", metavar="FILE", help="the model for --tokenizer sentencepiece")
    add(
        "--split",
        required=True,
        metavar="TRAIN,VALID,TEST",
        help="sizes in bytes (90M,5M,5M; 90000000,5000000,5000000) or shares (90%%,5%%,5%%; 0.9,0.05,0.05)",
    )
    add(
        "--json-key",
        metavar="KEY",
        help="the inputs are JSON, an object a line or an array of objects, with their text under this key",
    )
    add(
        "--input-format",
        choices=INPUT_FORMATS,
        default=AUTO,
        help="text: take JSON for the text it is; bytes: take any bytes (default: auto: UTF-8 text, or JSON with "
        "--json-key; everything else is refused)",
    )
    add(
        "--loss-after",
        metavar="LINE",
        help="with --json-key: a row is a prompt, to the end of this line, and a response; the loss of training is "
        "that of responses and their end",
    )
    add("--append-eod", action="store_true", help="end each document in an end-of-document token")
    add("--overwrite", action="store_true", help="replace the dataset in --output")
    info = commands.add_parser("info", help="show what a dataset holds", description="Show what a dataset holds.")
    info.add_argument("dataset", metavar="DIR_OR_PREFIX", help="a dataset's folder, or a split's prefix in it")


def run(args: argparse.Namespace) -> int:
    """Run ``rmoe data`` for parsed arguments; the exit code. A DataError becomes a line on stderr and code 2."""
    try:
        if args.data_command == "prepare":
            with _termination_cleans_up():
                metadata = prepare(
                    args.inputs,
                    args.output,
                    split=args.split,
                    tokenizer=args.tokenizer,
                    tokenizer_model=args.tokenizer_model,
                    json_key=args.json_key,
                    input_format=args.input_format,
                    append_eod=args.append_eod,
                    loss_after=args.loss_after,
                    overwrite=args.overwrite,
                    progress=True,
                )
            if metadata.newlines == "lost":
                print(
                    "rmoe: note: the tokenizer model has no line breaks: they became word boundaries", file=sys.stderr
                )
            if metadata.unknown_tokens:
                print(f"rmoe: note: {_unknown(metadata)}", file=sys.stderr)
        else:
            metadata = DatasetMetadata.load(args.dataset)
    except DataError as error:
        print(f"rmoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(metadata))
    return 0


def table(metadata: DatasetMetadata) -> str:
    """The metadata as lines of text."""
    rows = [("split", "bytes", "tokens", "documents", "bytes/token")]
    for name, split in metadata.splits.items():
        ratio = f"{split.bytes / split.tokens:.3f}" if split.tokens else "-"
        rows.append((name, f"{split.bytes:,}", f"{split.tokens:,}", f"{split.documents:,}", ratio))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    model = f" {metadata.tokenizer_model} (sha256 {metadata.tokenizer_sha256})" if metadata.tokenizer_model else ""
    eod = "none" if metadata.eod_id is None else str(metadata.eod_id)
    lines += [
        f"tokenizer   {metadata.tokenizer}{model}, line breaks {metadata.newlines}",
        f"vocabulary  {metadata.vocab_size:,}, stored as {metadata.dtype}, end of document: {eod}",
        f"split       {metadata.split}, {metadata.unused_bytes:,} bytes unused",
    ]
    if metadata.loss_after is not None:
        lines.append(f"loss        of what follows the line {metadata.loss_after!r}")
    if metadata.unknown_tokens:
        lines.append(f"unknown     {_unknown(metadata)}")
    lines += [
        f"source      {source.name}, {source.size:,} bytes, sha256 {source.sha256}" for source in metadata.sources
    ]
    return "\n".join(lines)


def _unknown(metadata: DatasetMetadata) -> str:
    total = sum(split.tokens for split in metadata.splits.values())
    share = metadata.unknown_tokens / total
    return f"{metadata.unknown_tokens:,} tokens ({share:.2%}) stand for characters that the tokenizer model lacks"


@contextmanager
def _termination_cleans_up() -> Iterator[None]:
    """Let SIGTERM, as a batch system sends it, remove the unfinished dataset as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
