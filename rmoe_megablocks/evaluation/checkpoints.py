"""``rmoe eval`` of a checkpoint: the launcher's own run of its configuration that only evaluates, in any layout."""

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmoe_megablocks import data, yaml12
from rmoe_megablocks.data.prepared.metadata import SplitMetadata
from rmoe_megablocks.data.split import SPLITS
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import report, texts

_LAUNCHER = "rmoe_megablocks.launcher"
_CONFIG = "config.yaml"
_TRACKER = "latest_checkpointed_iteration.txt"
#: one process, unless the command line says otherwise
_LAYOUT = {
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "1",
    "--expert-model-parallel-size": "1",
    "--expert-tensor-parallel-size": "1",
}
#: what else of a run's configuration is of its layout, its data or its training: taken back
_TAKEN_BACK = (
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank", "--sequence-parallel"),
    *("--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--train-data-path", "--valid-data-path", "--test-data-path", "--data-path", "--mock-data"),
    *("--save", "--tensorboard-dir", "--data-cache-path", "--load", "--ckpt-step", "--pretrained-checkpoint"),
    *("--finetune", "--no-load-optim", "--no-load-rng", "--moe-router-upcycle", "--exit-interval"),
    *("--no-final-evaluation", "--eval-tokens"),
)


def run(args: argparse.Namespace) -> int:
    """Evaluates and tells; the exit code: that of the launcher if it fails. Raises UsageError."""
    _refuse_of_folders(args)
    folder, step = locate(args.model)
    settings = folder.parent / _CONFIG
    if not settings.is_file():
        raise UsageError(
            f"{settings}: no such file; a checkpoint is evaluated with its run's configuration beside it, or export it "
            "(rmoe export) and evaluate that"
        )
    if not args.data.is_dir():
        raise UsageError(f"--data {args.data}: a checkpoint is evaluated on a folder of rmoe data prepare")
    split = args.split or "test"
    text, metadata = texts.of_dataset(args.data, split)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rmoe-") as scratch:
        place = Path(scratch)
        one_split(args.data, split, metadata, place / "data")
        command = [*argv(args, settings, folder, step), "--dataset", str(place / "data"), "--runs-dir", scratch]
        code = launch([*command, "--run-name", "eval"])
        if code:
            return code
        summary = json.loads((place / "eval" / "summary.json").read_bytes())
        settings_used = json.loads((place / "eval" / "arguments.json").read_bytes())
    told = summary["evaluation"]["test"]
    if "left_out" in told and "first_tokens" not in told:
        print(f"rmoe: nothing was evaluated: {told['left_out']}", file=sys.stderr)
        return 130 if "interrupted" in told["left_out"] else 2
    result = result_of(args, text, summary, settings_used)
    return report.tell({**result, "seconds": round(time.perf_counter() - started, 3)}, args.json)


def _refuse_of_folders(args: argparse.Namespace) -> None:
    for name in ("stride", "dtype", "device", "tokenizer_model"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for Hugging Face folders, and {args.model} is none: it has no "
                "config.json; rmoe export makes one of a checkpoint"
            )


def locate(checkpoint: Path) -> tuple[Path, int | None]:
    """The folder that --load names, and --ckpt-step where ``checkpoint`` is one of those in it.

    Raises:
        UsageError: it is neither.
    """
    if (checkpoint / _TRACKER).is_file():
        return checkpoint.resolve(), None
    name = checkpoint.resolve().name
    if name.startswith("iter_") and name[5:].isdigit():
        return checkpoint.resolve().parent, int(name[5:])
    raise UsageError(
        f"{checkpoint} is neither a Hugging Face folder (it has no config.json) nor one of checkpoints (nor {_TRACKER})"
    )


def one_split(source: Path, split: str, metadata: data.DatasetMetadata, target: Path) -> None:
    """Makes ``target`` a dataset whose test split is ``split`` of the one in ``source``, and that has no other."""
    target.mkdir()
    for ending in (".bin", ".idx"):
        (target / f"test{ending}").symlink_to((source / f"{split}{ending}").resolve())
    splits = {name: SplitMetadata(0, 0, 0) for name in SPLITS} | {"test": metadata.splits[split]}
    # without the masks of --loss-after: a text is evaluated whole
    dataclasses.replace(metadata, splits=splits, loss_after=None).save(target)


def argv(args: argparse.Namespace, settings: Path, folder: Path, step: int | None) -> list[str]:
    """The launcher's arguments: the run's configuration, in one process unless the command line names a layout."""
    typed = {word.partition("=")[0] for word in args.megatron_arguments if word.startswith("--")}
    given = yaml12.read(settings).content["MODEL_ARGS"]
    words = ["--config", str(settings), "--load", str(folder)]
    words += ["--skip-train", "--no-load-optim", "--no-checkpoints"]
    if step is not None:
        words += ["--ckpt-step", str(step)]
    for name, value in _LAYOUT.items():
        if name in given and name not in typed:
            words += [name, value]
    words += [f"{name}=null" for name in _TAKEN_BACK if name in given and name not in typed | set(words)]
    for name in ("seq_length", "micro_batch_size", "eval_tokens"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return [*words, *args.megatron_arguments]


def launch(words: Sequence[str], **variables: str) -> int:
    """Runs the launcher, which tells of itself on standard error. A signal to this process is its own to handle."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen([sys.executable, "-m", _LAUNCHER, *words], stdout=sys.stderr, env=environment)
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # the terminal sends it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def result_of(args: argparse.Namespace, text: texts.Text, summary: dict, used: dict[str, Any]) -> dict[str, Any]:
    """What :func:`rmoe_megablocks.evaluation.folders.run` says, from a run's summary and arguments."""
    told = summary["evaluation"]["test"]
    interrupted = "first_tokens" in told
    if interrupted:
        done, bits = told["first_tokens"], told["first_tokens_bpc"]
    else:
        done = told["tokens"]
        bits = summary["test_bpc_partial" if done < told["of"] else "test_bpc"]
    nats = bits * math.log(2) * text.counts.bytes / len(text.tokens) * done
    precision = next((name for name in ("bf16", "fp16") if used.get(name)), "fp32")
    predicted = report.Done(nats, done, interrupted, used["seq_length"], used["seq_length"])
    return {
        "model": str(args.model),
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision],
        "layout": summary["layout"],
        **report.result_of(args.data, text, predicted),
    }
