"""``rmoe export``: a Megatron checkpoint becomes a Hugging Face folder, which appears whole or not at all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rmoe_megablocks.conversion import partial
from rmoe_megablocks.conversion import source as sources
from rmoe_megablocks.conversion.folder import card, shards, tokenizers
from rmoe_megablocks.conversion.folder.shards import Shard
from rmoe_megablocks.conversion.folder.tokenizers import Tokenizer
from rmoe_megablocks.conversion.mapping import released
from rmoe_megablocks.conversion.mapping.configuration import MODEL_TYPE
from rmoe_megablocks.conversion.source import Source
from rmoe_megablocks.conversion.verification import comparison
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.megatron.checkpoints.files import write_atomically
from rmoe_megablocks.process import progress_stream
from rmoe_megablocks.torch_dist.unpickling import INDEX


@dataclass(frozen=True)
class Options:
    """What the command line says: see cli.py."""

    step: int | None = None
    max_shard_size: int = 4 * 10**9
    tokenizer: str | None = None
    run: Path | None = None
    verify: bool = True
    trusts_router: bool = False
    layout: str = MODEL_TYPE


def export(checkpoint: Path, folder: Path, options: Options) -> list[str]:
    """Writes ``folder``; what is written so far stays in FOLDER.partial, where the same command goes on.

    Returns:
        lines to tell the user.

    Raises:
        UsageError: one line; nothing is left in the place of ``folder``.
    """
    partial.check_new(folder)
    found, tokenizer = _open(checkpoint, options)
    said = found.config
    if options.layout == released.LAYOUT:
        said = released.config_of(found.config)
        spelled = [replace(s, entry=released.entry(s.entry, found.config)) for s in found.weights.sources]
        found = replace(found, weights=replace(found.weights, sources=spelled))
    if options.verify:
        comparison.check_available()
    planned = shards.plan(found.weights, options.max_shard_size)
    with partial.writing(folder, "FOLDER") as place:
        difference = _write(place, folder.name, found, said, tokenizer, planned, options)
    return _told(found, folder, planned, difference)


def _write(
    place: Path,
    name: str,
    found: Source,
    said: Mapping[str, Any],
    tokenizer: Tokenizer,
    planned: list[Shard],
    options: Options,
) -> str | None:
    """Everything that the folder has, in ``place``, with ``said`` as its config.json; the measured difference in words,
    None if it was not measured."""
    asked = f"{options.max_shard_size} {options.layout}"
    identity = hashlib.sha256((found.folder / INDEX).read_bytes() + asked.encode()).hexdigest()
    _forget_others(place, planned)
    with tqdm(
        total=_bytes(planned), unit="B", unit_scale=True, mininterval=1.0, desc=name, file=progress_stream()
    ) as bar:
        shards.write(place, planned, found.weights, identity, bar.update)
    ids = tokenizers.write(tokenizer, place, found.config["max_position_embeddings"])
    dtype = str(found.weights.sources[0].dtype).removeprefix("torch.")  # of the embedding, and so of all parameters
    _write_json(place / "config.json", {**said, **ids, "dtype": dtype})
    _write_json(place / "generation_config.json", ids)
    if options.layout == MODEL_TYPE:
        _write_code(place)
    difference = None
    if options.verify:
        partial.say("comparing logits with Megatron's, on the CPU")
        difference = comparison.compare(found, place, tokenizer, options.trusts_router)
    facts = card.Facts(
        name=name,
        config=found.config,
        parameters=sources.parameters(found.config),
        iteration=found.iteration,
        run=options.run or _run_of(found.folder),
        difference=difference,
        left_out=found.weights.left_out,
        tokenizer=tokenizer.kind,
    )
    write_atomically(place / "README.md", card.text(facts))
    (place / shards.PROGRESS).unlink(missing_ok=True)
    shards.write_checksums(place, partial.is_ours)
    return difference


def _write_code(place: Path) -> None:
    """The model's code beside the weights, for ``trust_remote_code``; why there is none is told."""
    try:
        from rmoe_megablocks.huggingface import RmoeConfig
        from rmoe_megablocks.huggingface.folders.standalone import write_code
    except ImportError:
        partial.say("no code beside the weights: that needs transformers; where this package is, the folder loads")
        return
    try:
        write_code(place, RmoeConfig.from_pretrained(place))
    except ValueError as error:
        partial.say(f"no code beside the weights: {error}")


def _open(checkpoint: Path, options: Options) -> tuple[Source, Tokenizer]:
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


def _forget_others(place: Path, planned: list[Shard]) -> None:
    """Removes what an export with other options, or a kill, left behind."""
    kept = {shards.PROGRESS, *(shard.file for shard in planned)}
    for path in place.iterdir():
        if path.is_file() and path.name not in kept and not partial.is_ours(path.name):
            path.unlink()


def _bytes(planned: list[Shard]) -> int:
    return sum(shard.size for shard in planned)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _run_of(checkpoint: Path) -> Path | None:
    """RUNS_DIR/RUN_NAME of RUNS_DIR/RUN_NAME/checkpoints/iter_0000100, if it is a run's folder."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "summary.json").is_file() or (run / "metrics.jsonl").is_file() else None


def _told(found: Source, folder: Path, planned: list[Shard], difference: str | None) -> list[str]:
    files, size = len(planned), _bytes(planned)
    lines = [f"{folder}: iteration {found.iteration}, {size:,} bytes of weights in {files} file{'s' * (files != 1)}"]
    padding = max((source.padding for source in found.weights.sources), default=0)
    if padding:
        lines.append(f"{padding} rows of padding are not in the model; {shards.PADDING} keeps them for rmoe import")
    if found.weights.left_out:
        lines.append(f"left out, as the model has no multi-token prediction: {', '.join(found.weights.left_out)}")
    if difference:
        lines.append(difference)
    return lines
