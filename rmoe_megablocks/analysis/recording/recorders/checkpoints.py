"""Records a checkpoint: a run of the launcher that only evaluates, whose ranks stream; their pieces are joined."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rmoe_megablocks import data as datasets
from rmoe_megablocks import yaml12
from rmoe_megablocks.analysis.recording.about import About, ToldAlready
from rmoe_megablocks.analysis.recording.recorders.weights import ROUTER_ROWS, gathered
from rmoe_megablocks.analysis.recording.texts import Named, data_entry, vocabulary
from rmoe_megablocks.analysis.recording.writing import Writer, new_folder
from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import checkpoints, texts
from rmoe_megablocks.process import progress_stream, quiet_logging, quiet_warnings
from rmoe_megablocks.routing.watching import RECORD_TO, row_dtype

if TYPE_CHECKING:
    from rmoe_megablocks.conversion.source import Source

_FOLDERS_ALONE = ("dtype", "device", "tokenizer_model")
_ONE = ("--tensor-model-parallel-size", "--context-parallel-size")


@dataclass(frozen=True)
class Pass:
    """One text through the model: where its ranks' files lie, and the arguments of the run.

    Attributes:
        tokens: those that go in, and the one behind them.
        tokenizer: kind of the dataset's.
    """

    named: Named
    tokens: np.ndarray
    tokenizer: str
    folder: Path
    args: dict[str, Any]
    iteration: int
    interrupted: bool


def record(args: argparse.Namespace, above: Path, step: int | None, name: str, target: Path, data: list[Named]) -> bool:
    """As :func:`.folders.record`, of the checkpoint of iteration ``step`` (None: the latest) in ``above``.

    Raises:
        UsageError: also for a layout in which ranks share a window, and whatever the launcher told already.
    """
    for option in _FOLDERS_ALONE:
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for Hugging Face folders, and {above} is none")
    for group in groups_of(args.megatron_arguments):
        option, _, value = group[0].partition("=")
        value = value or (group[1] if len(group) > 1 else "")
        if option in _ONE and value != "1":
            raise UsageError(f"{option} {value}: routing is recorded with 1; leave it out")
    settings = above.parent / "config.yaml"
    if not settings.is_file():
        raise UsageError(f"{settings}: no such file; a checkpoint is recorded with its run's configuration beside it")
    new_folder(target)
    with tempfile.TemporaryDirectory(prefix="rmoe-") as scratch:
        prepared = [_prepared(one, args.split, settings, Path(scratch)) for one in data]
        asked = argparse.Namespace(**vars(args) | {"eval_tokens": args.tokens})
        words = checkpoints.argv(asked, settings, above, step)
        passes: list[Pass] = []
        for number, (one, folder, split) in enumerate(prepared):
            passes.append(_run(one, folder, split, words, Path(scratch) / f"run-{number}"))
            if passes[-1].interrupted:
                break
        found, why = _source(above, step)
        if why:
            print(f"rmoe: no similarity of weights: {why}", file=sys.stderr)
        about = _about(name, above, passes, Streams.of(passes[0].folder), found)
        with Writer(target, about) as writer:
            complete = _join(writer, passes) and len(passes) == len(data)
            if not writer.token_ids:
                raise KeyboardInterrupt
            writer.finish(complete, _similarities(found, about), _pieces(writer, passes[0].args))
    return complete


def _tokenizer_of(given: dict[str, Any]) -> str | None:
    """Of a run with these arguments: its dataset's, that of bytes where it names no data and so has the embedded text;
    None where it cannot be told."""
    if given.get("--dataset"):
        own = Path(given["--dataset"])
        return datasets.DatasetMetadata.load(own).tokenizer if own.is_dir() else None
    named = ("--mock-data", "--tokenizer-type", "data-path", "data-args-path")
    return None if any(value and option.endswith(named) for option, value in given.items()) else "bytes"


def _prepared(one: Named, split: str | None, settings: Path, scratch: Path) -> tuple[Named, Path, str]:
    """A dataset of the text, and its split: made here of a text file where the run's tokenizer is that of bytes."""
    given = yaml12.read(settings).content["MODEL_ARGS"]
    kind = _tokenizer_of(given)
    if texts.is_dataset(one.path):
        _check_tokenizer(one, given, kind)
        return one, one.path, split or "test"
    if kind != "bytes":
        raise UsageError(
            f"--data {one.path}: a checkpoint is recorded on a folder of rmoe data prepare, as its run's tokenizer "
            f"({kind or 'unknown'}) is not that of bytes"
        )
    place = scratch / f"text-{one.label}"
    megatron_cpu.install(announce=False)  # before the first import of Megatron, which preparing is
    datasets.prepare([one.path], place, split="100%,0,0", input_format="bytes")
    return one, place, "train"


def _check_tokenizer(one: Named, given: dict[str, Any], kind: str | None) -> None:
    """Raises UsageError for a dataset of other ids than the run's, as far as the run's are known."""
    theirs = datasets.DatasetMetadata.load(one.path)
    ours = Path(given.get("--dataset") or "")
    same_model = True
    if kind not in (None, "bytes"):
        same_model = datasets.DatasetMetadata.load(ours).tokenizer_sha256 == theirs.tokenizer_sha256
    if kind not in (None, theirs.tokenizer) or not same_model:
        raise UsageError(
            f"--data {one.path}: was prepared with the tokenizer {theirs.tokenizer_model or theirs.tokenizer}, the run "
            f"has been trained on {kind}{'' if same_model else ' of another model'}: prepare the text with the run's"
        )


def _run(one: Named, dataset: Path, split: str, words: list[str], place: Path) -> Pass:
    """Raises ToldAlready if the launcher fails."""
    text, metadata = texts.of_dataset(dataset, split)
    streams = place / "streams"
    streams.mkdir(parents=True)
    checkpoints.one_split(dataset, split, metadata, place / "data")
    command = [*words, "--dataset", str(place / "data"), "--runs-dir", str(place), "--run-name", "run"]
    code = checkpoints.launch(command, **{RECORD_TO: str(streams)})
    if code:
        raise ToldAlready(code)
    summary = json.loads((place / "run" / "summary.json").read_bytes())
    used = json.loads((place / "run" / "arguments.json").read_bytes())
    left_out = summary["evaluation"]["test"].get("left_out", "")
    if left_out and "interrupted" not in left_out:
        raise UsageError(f"nothing was recorded: {left_out}")
    predicted = min(len(text.tokens) - 1, used.get("eval_tokens") or len(text.tokens))
    tokens = np.asarray(text.tokens[: predicted + 1])
    return Pass(one, tokens, metadata.tokenizer, streams, used, summary["iterations"], bool(left_out))


def _source(above: Path, step: int | None) -> tuple[Source | None, str]:
    """The checkpoint's weights and model; else why they cannot be had, which recorded routing does not need."""
    quiet_warnings(speaks=True)
    from rmoe_megablocks.conversion import source as sources  # imports Megatron

    try:
        with quiet_logging():
            return sources.open_source(above, step, None, trusts_router=True, any_vocabulary=True), ""
    except UsageError as error:
        return None, str(error)


@dataclass(frozen=True)
class Streams:
    """What the ranks of a pass have written.

    Attributes:
        layers: of the model, from 1, in order.
        columns: of states and gates.
        state_size: width of a layer's own state.
        ranks: data-parallel ones, which take turns with micro-batches of ``rows`` windows.
    """

    folder: Path
    layers: list[int]
    columns: tuple[str, ...]
    state_size: int
    ranks: int
    rows: int

    @classmethod
    def of(cls, folder: Path) -> Streams:
        said = [json.loads(path.read_bytes()) for path in sorted(folder.glob("rank-*.json"))]
        layers = sorted({layer for one in said for layer in one["layers"]})
        columns = {tuple(names) for one in said for names in one["columns"]}
        if not layers or len(columns) != 1:
            raise UsageError("the run's ranks have recorded no routing: was it interrupted at its start?")
        first = said[0]
        size = max(one["state_size"] for one in said)
        return cls(folder, layers, columns.pop(), size, first["ranks"], first["rows"])

    def open(self, name: str, dtype: np.dtype, seq_length: int) -> list[np.ndarray]:
        """[windows, S] of each data-parallel rank, as far as windows are whole; of none where there is no file."""
        found = []
        for rank in range(self.ranks):
            path = self.folder / f"{name}.dp-{rank}.bin"
            windows = path.stat().st_size // (dtype.itemsize * seq_length) if path.is_file() else 0
            shape = (windows, seq_length)
            found.append(np.memmap(path, dtype, "r", shape=shape) if windows else np.empty(shape, dtype))
        return found


def _about(name: str, above: Path, passes: list[Pass], streams: Streams, found: Source | None) -> About:
    used = passes[0].args
    return About(
        name=name,
        model=str(above),
        router_type=used["moe_router_type"],
        recurrent=bool(streams.state_size),
        layers=streams.layers,
        experts=used["num_experts"],
        topk=used["moe_router_topk"],
        null_experts=used.get("moe_null_experts") or 0,
        hidden_size=used["hidden_size"],
        state_size=streams.state_size,
        iteration=found.iteration if found else passes[0].iteration,
        tokenizer={"kind": passes[0].tokenizer},
        data=[data_entry(one.named, one.tokens[:-1]) for one in passes],
        seq_length=used["seq_length"],
        score_function=used["moe_router_score_function"],
        config={**found.config, "vocab_size": used.get("vocab_size")} if found else {},
        seed=used.get("seed"),
    )


def _join(writer: Writer, passes: list[Pass]) -> bool:
    """Writes all passes' rows in text order; whether none is missing."""
    first, complete = 0, True
    total = sum(len(one.tokens) - 1 for one in passes)
    with tqdm(total=total, desc="joining", unit=" tokens", unit_scale=True, file=progress_stream(), leave=False) as bar:
        for one in passes:
            whole, windows = _join_pass(writer, one, first, bar.update)
            complete, first = complete and whole, first + windows
    return complete


def _join_pass(writer: Writer, one: Pass, first: int, advance: Callable[[int], None]) -> tuple[bool, int]:
    about, streams = writer.about, Streams.of(one.folder)
    length, predicted = one.args["seq_length"], len(one.tokens) - 1
    dtype = row_dtype(about.experts, about.topk, streams.columns)
    layers = [streams.open(f"layer-{layer:05}", dtype, length) for layer in streams.layers]
    likeliest = streams.open("predicted", np.dtype("<i4"), length)
    windows = -(-predicted // length)
    for window in range(windows):
        batch, row = divmod(window, streams.rows)
        turn, rank = divmod(batch, streams.ranks)
        place = turn * streams.rows + row
        if any(place >= len(files[rank]) for files in layers):
            return False, window
        start = window * length
        tokens = min(length, predicted - start)
        rows_LT = np.stack([files[rank][place, :tokens] for files in layers])
        there = place < len(likeliest[rank])
        writer.write(
            token_T=one.tokens[start : start + tokens],
            next_token_T=one.tokens[start + 1 : start + tokens + 1],
            predicted_T=likeliest[rank][place, :tokens] if there else None,
            position_T=np.arange(tokens),
            window_T=np.full(tokens, first + window),
            domain_T=np.full(tokens, one.named.label),
            choices_TLK=rows_LT["choices"].swapaxes(0, 1),
            scores_TLE=rows_LT["scores"].swapaxes(0, 1),
            margin_TL=rows_LT["margin"].T,
            **{f"{name}_TL": rows_LT[name].T for name in streams.columns},
        )
        advance(tokens)
    return True, windows


def _similarities(found: Source | None, about: About) -> dict[str, np.ndarray]:
    """Of the checkpoint's own files: no rank has all experts."""
    if found is None:
        return {}
    by_name = {name: (one, place) for one in found.weights.sources for place, name in enumerate(one.entry.names)}

    def read(name: str) -> Any | None:
        if name not in by_name:
            return None
        one, place = by_name[name]
        return found.weights.read(one)[place]

    def pair(prefix: str) -> tuple | None:
        both = read(f"{prefix}experts.gate_up_proj"), read(f"{prefix}experts.down_proj")
        return None if any(one is None for one in both) else both

    def rows(prefix: str) -> Any | None:
        names = (f"{prefix}router.weight", *(f"{prefix}router.layer.{name}" for name in ROUTER_ROWS))
        return next((read(name) for name in names if name in by_name), None)

    prefixes = [f"model.layers.{layer - 1}.mlp." for layer in about.layers]
    return gathered(about.experts, (partial(pair, one) for one in prefixes), (partial(rows, one) for one in prefixes))


def _pieces(writer: Writer, used: dict[str, Any]) -> dict[int, str]:
    """Texts of the ids that occur: bytes, or a SentencePiece model that is still there; else none."""
    if writer.about.tokenizer["kind"] == "bytes":
        return vocabulary(writer.token_ids, None)
    model = used.get("tokenizer_model")
    if not model or not Path(model).is_file():
        return {}
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    known = processor.vocab_size()
    return {
        number: processor.id_to_piece(number).replace("▁", " ") if number < known else f"<{number}>"
        for number in writer.token_ids
    }
