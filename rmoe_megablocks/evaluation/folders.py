"""``rmoe eval`` of a Hugging Face folder: one process, or several under ``accelerate launch`` or torchrun."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import loading, report, texts
from rmoe_megablocks.evaluation.prediction import Processes, Sum, predict
from rmoe_megablocks.evaluation.windows import Windows
from rmoe_megablocks.process import progress_stream

_UNLIMITED = 10**6  # what tokenizers without a limit say is larger
_BATCH = 4


def run(args: argparse.Namespace) -> int:
    """Evaluates and tells; the exit code. Raises UsageError."""
    loading.prepare(args.model, args.trust_router_code)
    check_checksums(args.model)
    processes = Processes(args.device)
    tokenizer = loading.tokenizer(args.model, args.trust_remote_code)
    text = read(args.data, args.split, tokenizer, args.tokenizer_model)
    dtype = args.dtype or "float32"
    model = loading.model(args.model, getattr(torch, dtype), processes.device, args.trust_remote_code)
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(text.tokens.max()) >= vocabulary:
        raise UsageError(f"{args.data} has the token id {text.tokens.max()}, the model has {vocabulary:,} ids")
    windows = choose_windows(args, model.config, tokenizer, len(text.tokens) - 1)
    started = time.perf_counter()
    done = _with_progress(model, text, windows, args.micro_batch_size or _BATCH, processes)
    if processes.rank:
        return 130 if done.interrupted else 0
    if not done.tokens:
        raise UsageError("interrupted before any token was predicted")
    result = {
        "model": args.model.name or str(args.model),
        "seconds": round(time.perf_counter() - started, 3),
        "dtype": dtype,
        "layout": f"{processes.size} process{'es' * (processes.size > 1)} on {processes.device.type}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **report.result_of(
            args.data, text, report.Done(done.nats, done.tokens, done.interrupted, windows.size, windows.stride)
        ),
    }
    return report.tell(result, args.json)


def read(path: Path, split: str | None, tokenizer: Any, tokenizer_model: Path | None) -> texts.Text:
    """The text of --data for a model's tokenizer. Raises UsageError."""
    if not texts.is_dataset(path):
        return texts.of_file(path, tokenizer)
    text, metadata = texts.of_dataset(path, split or "test")
    texts.check_tokenizer(metadata, tokenizer, tokenizer_model)
    return text


def choose_windows(args: argparse.Namespace, config: Any, tokenizer: Any, predicted: int) -> Windows:
    """Windows of --seq-length and --stride. Raises UsageError for what the model has no positions for."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    default = min(longest or _UNLIMITED, getattr(tokenizer, "model_max_length", None) or _UNLIMITED)
    length = args.seq_length or default
    if length >= _UNLIMITED:
        raise UsageError(f"{args.model} does not say how long its sequences are: name --seq-length")
    if longest and length > longest:
        raise UsageError(f"--seq-length {length}: the model has been made for {longest}")
    stride = args.stride or length
    if stride > length:
        raise UsageError(f"--stride {stride} is larger than --seq-length {length}: tokens would be left out")
    return Windows(min(predicted, args.eval_tokens or predicted), length, stride)


def _with_progress(model, text: texts.Text, windows: Windows, batch: int, processes: Processes) -> Sum:
    stream = progress_stream()
    with tqdm(
        total=windows.predicted,
        desc="evaluating",
        unit=" tokens",
        unit_scale=True,
        file=stream,
        disable=processes.rank > 0,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1 if hasattr(stream, "isatty") else 30,  # lines of a file rather than a bar
    ) as bar:
        return predict(model, text.tokens, windows, batch, processes, bar.update)
