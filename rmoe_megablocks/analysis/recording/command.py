"""What ``rmoe analyze`` does: recordings of all that it was given, then their measures."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.analysis.recording.about import need
from rmoe_megablocks.analysis.recording.reading import Recording, is_recording
from rmoe_megablocks.analysis.recording.texts import Named, check_same_tokenizer, named
from rmoe_megablocks.analysis.report import arguments as report
from rmoe_megablocks.errors import UsageError

_RECORDED, _TRACE, _FOLDER, _CHECKPOINT = "recording", "trace", "folder", "checkpoint"


@dataclass(frozen=True)
class Model:
    """One thing to measure.

    Attributes:
        kind: what it is.
        name: of its recording.
        step: of a folder of checkpoints.
    """

    kind: str
    path: Path
    name: str
    step: int | None = None


def run(args: argparse.Namespace) -> int:
    """Records and measures; the exit code. Raises UsageError before anything was written, or for one model's fault."""
    models = _models(args)
    to_record = [model for model in models if model.kind != _RECORDED]
    report.check(args, len({model.path for model in models}))
    data = named(args.data or [])
    _check(args, models, to_record, data)
    recordings: list[Recording] = []
    for model in models:
        target = model.path
        if model.kind != _RECORDED:
            target = args.out / model.name
            if not _record(args, model, target, data):
                print(f"rmoe: {target} is partial: interrupted; nothing was measured", file=sys.stderr)
                return 130
        recordings.append(Recording.open(target))
        if not args.no_measures:
            check_same_tokenizer(recordings[0], recordings[-1])
    if args.write_trace:
        from rmoe_megablocks.analysis.recording.recorders import traces

        traces.write(recordings[0], args.write_trace)
    if not args.no_measures:
        _measure(args, models, recordings)
    return 0


def _models(args: argparse.Namespace) -> list[Model]:
    found: list[Model] = []
    for path in args.models:
        found += _models_of(path, args.steps)
    for model in found:
        if sum(other.name == model.name for other in found) > 1:
            raise UsageError(f"two of the models are called {model.name}: rename a folder, or analyze them one by one")
    return found


def _models_of(path: Path, steps: str | None) -> list[Model]:
    name = _name(path)
    if path.is_file():
        if path.suffix != ".jsonl":
            raise UsageError(f"{path} is a file: a model is a folder, a routing trace ends in .jsonl")
        return [Model(_TRACE, path, name)]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    if is_recording(path):
        return [Model(_RECORDED, path, name)]
    if (path / "config.json").is_file():
        return [Model(_FOLDER, path, name)]
    from rmoe_megablocks.evaluation.checkpoints import locate

    above, step = locate(path)
    if steps is None:
        return [Model(_CHECKPOINT, above, name, step)]
    if step is not None:
        raise UsageError(f"--steps {steps}: {path} is one checkpoint; name the folder above")
    return [Model(_CHECKPOINT, above, f"{name}-{number}", number) for number in _steps(above, steps)]


def _name(path: Path) -> str:
    """Of a recording: the folder's, of checkpoints the run's."""
    path = path.resolve()
    if path.name == "checkpoints" and path.parent.name:
        path = path.parent
    return path.stem if path.suffix == ".jsonl" else path.name


def _steps(above: Path, steps: str) -> list[int]:
    there = sorted(int(one.name[5:]) for one in above.glob("iter_*") if one.is_dir() and one.name[5:].isdigit())
    if steps == "all":
        asked = there
    elif re.fullmatch(r"\d+(,\d+)*", steps):
        asked = sorted({int(word) for word in steps.split(",")})
    else:
        raise UsageError(f"--steps {steps}: expected all, or iterations as 100,200")
    for step in asked:
        if step not in there:
            raise UsageError(f"--steps: {above} has no checkpoint of iteration {step} (there: {there})")
    if not asked:
        raise UsageError(f"--steps {steps}: {above} has no checkpoint")
    return asked


def _check(args: argparse.Namespace, models: list[Model], to_record: list[Model], data: list[Named]) -> None:
    """Raises UsageError for options that do not go together, before the first model is read."""
    kinds = {model.kind for model in models}
    if to_record and args.out is None:
        raise UsageError("--out DIR is needed: where the recordings go")
    if not data and kinds & {_FOLDER, _CHECKPOINT}:
        raise UsageError("--data WHAT is needed: the text to record on")
    if data and not kinds & {_FOLDER, _CHECKPOINT}:
        raise UsageError("--data is for models, and there are recordings alone: leave it out")
    if args.steps and _CHECKPOINT not in kinds:
        raise UsageError("--steps is for folders of checkpoints")
    if args.megatron_arguments and _CHECKPOINT not in kinds:
        raise UsageError("unrecognized arguments for what is no checkpoint: " + " ".join(args.megatron_arguments))
    if (args.compare or args.baseline) and len(models) < 2:
        raise UsageError("--compare needs two models or more" if args.compare else "--baseline is for several models")
    if (args.compare or args.baseline) and args.no_measures:
        raise UsageError("--compare puts measures side by side: leave --no-measures out")
    if args.write_trace and len(models) > 1:
        raise UsageError("--write-trace writes one model's trace: name one")
    if args.split and any(one.path.is_file() for one in data):
        raise UsageError(f"--split {args.split}: --data names a file, all of which is read")
    if len(models) > 1 and not args.no_measures:
        need("pandas", "scipy", "tabulate")
    from rmoe_megablocks.analysis.recording.writing import new_folder

    for model in to_record:
        new_folder(args.out / model.name)


def _record(args: argparse.Namespace, model: Model, target: Path, data: list[Named]) -> bool:
    if model.kind == _TRACE:
        from rmoe_megablocks.analysis.recording.recorders import traces

        traces.read(model.path, model.name, target, args.tokens)
        return True
    if model.kind == _FOLDER:
        from rmoe_megablocks.evaluation.cli import need as need_of_folders

        need_of_folders("transformers")
        need_of_folders("safetensors")
        from rmoe_megablocks.analysis.recording.recorders import folders

        return folders.record(args, model.path, model.name, target, data)
    from rmoe_megablocks.analysis.recording.recorders import checkpoints

    return checkpoints.record(args, model.path, model.step, model.name, target, data)


def _measure(args: argparse.Namespace, models: list[Model], recordings: list[Recording]) -> None:
    """``measures.json`` and tables beside each recording, and what is told of them."""
    from rmoe_megablocks.analysis import measuring
    from rmoe_megablocks.analysis.measuring.arguments import options_of

    options = options_of(args)
    for recording in recordings:
        if len(recording.about.layers) == 1:
            print(f"rmoe: {recording.about.name} has one layer with experts: nothing compares layers", file=sys.stderr)
    measured = [measuring.measure(recording, options) for recording in recordings]
    if args.steps:
        for path in dict.fromkeys(model.path for model in models if model.step is not None):
            places = [i for i, model in enumerate(models) if model.path == path]
            if len(places) > 1:
                last = max(places, key=lambda i: recordings[i].about.iteration or 0)
                measured[last]["measures"] |= measuring.over_training([recordings[i] for i in places])
    for recording, found in zip(recordings, measured, strict=True):
        folder = recording.folder if args.out is None else args.out / recording.about.name
        measuring.write(found, folder)
        print(f"{recording.about.name}: {recording.about.tokens:,} tokens, {folder / 'measures.json'}")
    if len(measured) > 1:
        try:
            print(measuring.compare(measured, baseline=args.baseline).text())
        except UsageError as error:
            if args.compare or args.baseline:
                raise
            print(f"rmoe: not compared: {error}", file=sys.stderr)
    if args.report:
        from rmoe_megablocks.analysis.report import write

        # of a run's checkpoints the last, which has the figures over training
        shown = [
            i
            for i, model in enumerate(models)
            if not any(
                other.path == model.path and (recordings[j].about.iteration or 0) > (recordings[i].about.iteration or 0)
                for j, other in enumerate(models)
            )
        ]
        chosen = [recordings[i] for i in shown], [measured[i] for i in shown]
        print(f"report: {write(args.report, *chosen, tokens=args.report_tokens, baseline=args.baseline)}")
