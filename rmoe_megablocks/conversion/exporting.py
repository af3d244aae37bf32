"""``rmoe export``: a Megatron checkpoint becomes a Hugging Face folder, which appears whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rmoe_megablocks.conversion import source as sources
from rmoe_megablocks.conversion.folder import card, shards, tokenizers
from rmoe_megablocks.conversion.source import Source
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints.files import write_atomically
from rmoe_megablocks.process import progress_stream
from rmoe_megablocks.torch_dist.unpickling import INDEX

_PARTIAL = ".partial"


@dataclass(frozen=True)
class Options:
    """What the command line says: see cli.py."""

    step: int | None = None
    max_shard_size: int = 4 * 10**9
    tokenizer: str | None = None
    run: Path | None = None
    verify: bool = True
    trusts_router: bool = False


def export(checkpoint: Path, folder: Path, options: Options) -> list[str]:
    """Writes ``folder``; what is written so far stays in FOLDER.partial, where the same command goes on.

    Returns:
        lines to tell the user.

    Raises:
        UsageError: one line; nothing is left in the place of ``folder``.
    """
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists: name a new folder, or remove it")
    found, tokenizer = _open(checkpoint, options)
    if options.verify:
        from rmoe_megablocks.conversion.verification import comparison

        comparison.check_available()
    partial = folder.with_name(folder.name + _PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    planned = shards.plan(found.weights, options.max_shard_size)
    identity = hashlib.sha256((found.folder / INDEX).read_bytes() + str(options.max_shard_size).encode()).hexdigest()
    _forget_others(partial, planned)
    total = sum(shard.size for shard in planned)
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, file=progress_stream()) as bar:
        shards.write(partial, planned, found.weights, identity, bar.update)
    ids = tokenizers.write(tokenizer, partial, found.config["max_position_embeddings"])
    _write_json(partial / "config.json", _with_dtype(found))
    _write_json(partial / "generation_config.json", ids)
    difference = None
    if options.verify:
        difference = comparison.compare(found, partial, tokenizer)
    run = options.run or _run_of(found.folder)
    facts = card.Facts(
        name=folder.name,
        config=found.config,
        parameters=sources.parameters(found.config),
        iteration=found.iteration,
        run=run,
        difference=difference,
        left_out=found.weights.left_out,
        tokenizer=tokenizer.kind,
    )
    write_atomically(partial / "README.md", card.text(facts))
    (partial / shards.PROGRESS).unlink(missing_ok=True)
    shards.write_checksums(partial)
    if folder.exists():
        raise UsageError(f"{folder} has appeared meanwhile: the export is in {partial}")
    partial.rename(folder)
    return _told(found, folder, len(planned), total, difference)


def _open(checkpoint: Path, options: Options) -> tuple[Source, tokenizers.Tokenizer]:
    """The checkpoint and its tokenizer, which may have to say how large the vocabulary is."""
    named = tokenizers.choose(None, options.tokenizer) if options.tokenizer else None
    size = named.vocab_size if named and named.kind not in ("bytes", "none") else None
    try:
        found = sources.open_source(checkpoint, options.step, size, options.trusts_router)
    except sources.UnknownVocabulary as error:
        tokenizer = named or tokenizers.choose(error.args_of_run, None)
        found = sources.open_source(checkpoint, options.step, tokenizer.vocab_size, options.trusts_router)
        return found, tokenizer
    tokenizer = named or tokenizers.choose(found.args, None)
    if tokenizer.vocab_size and tokenizer.vocab_size > found.config["vocab_size"]:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {found.config['vocab_size']}: it is another's"
        )
    return found, tokenizer


def _forget_others(partial: Path, planned: list[shards.Shard]) -> None:
    """Removes what an export with other options, or a kill, left behind."""
    kept = {shards.PROGRESS, *(shard.file for shard in planned)}
    for path in partial.iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()


def _with_dtype(found: Source) -> Mapping[str, Any]:
    """config.json; its dtype is that of the embedding, as Megatron's parameters have one."""
    return {**found.config, "dtype": str(found.weights.sources[0].dtype).removeprefix("torch.")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _run_of(checkpoint: Path) -> Path | None:
    """RUNS_DIR/RUN_NAME of RUNS_DIR/RUN_NAME/checkpoints/iter_0000100, if it is a run's folder."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "summary.json").is_file() or (run / "metrics.jsonl").is_file() else None


def _told(found: Source, folder: Path, files: int, size: int, difference: str | None) -> list[str]:
    lines = [f"{folder}: iteration {found.iteration}, {size:,} bytes of weights in {files} file{'s' * (files != 1)}"]
    padding = max((source.padding for source in found.weights.sources), default=0)
    if padding:
        lines.append(f"{padding} rows of padding are not in the model; {shards.PADDING} keeps them for rmoe import")
    if found.weights.left_out:
        lines.append(f"left out, as the model has no multi-token prediction: {', '.join(found.weights.left_out)}")
    if difference:
        lines.append(difference)
    return lines
