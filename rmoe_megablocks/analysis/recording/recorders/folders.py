"""Records a Hugging Face folder: one pass over texts in windows, as ``rmoe eval`` reads them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rmoe_megablocks.analysis.recording.about import About
from rmoe_megablocks.analysis.recording.recorders import routers
from rmoe_megablocks.analysis.recording.recorders.weights import similarities
from rmoe_megablocks.analysis.recording.texts import Named, data_entry, vocabulary
from rmoe_megablocks.analysis.recording.writing import Writer, new_folder
from rmoe_megablocks.conversion.folder.checksums import check_checksums
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation import folders, loading, texts
from rmoe_megablocks.evaluation.prediction import Processes, batch_of, noted_signals
from rmoe_megablocks.evaluation.windows import Window, Windows
from rmoe_megablocks.process import progress_stream
from rmoe_megablocks.routing.watching import Choice, StateWatch, carries

_BATCH = 4


@dataclass(frozen=True)
class Part:
    """A text, its label, and the windows over it; ``first`` is the number of the first of them."""

    named: Named
    text: texts.Text
    windows: Windows
    first: int


def record(args: argparse.Namespace, folder: Path, name: str, target: Path, data: list[Named]) -> bool:
    """Records the model of ``folder`` into the new folder ``target``.

    Args:
        args: ``tokens`` (of each text; None for all), ``split``, ``seq_length``, ``micro_batch_size``, ``dtype``,
            ``device``, ``tokenizer_model``, ``trust_remote_code``, ``trust_router_code``.

    Returns:
        whether all of it was; else Ctrl-C came, and the recording says so.

    Raises:
        UsageError: one line; nothing is left.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("rmoe analyze records a Hugging Face folder in one process: start it without torchrun")
    new_folder(target)
    loading.prepare(folder, args.trust_router_code)
    check_checksums(folder)
    device = Processes(args.device).device
    tokenizer = loading.tokenizer(folder, args.trust_remote_code)
    read = [(one, folders.read(one.path, args.split, tokenizer, args.tokenizer_model)) for one in data]
    dtype = args.dtype or "float32"
    model = loading.model(folder, getattr(torch, dtype), device, args.trust_remote_code)
    found = routers.find(model, folder)
    parts = _parts(args, folder, model, tokenizer, read)
    about = about_of(args, folder, name, model, found, tokenizer, parts, dtype)
    with Writer(target, about) as writer:
        complete = _pass(model, found, parts, args.micro_batch_size or _BATCH, device, writer)
        if not writer.token_ids:
            raise KeyboardInterrupt
        writer.finish(complete, similarities(model, found), vocabulary(writer.token_ids, tokenizer))
    return complete


def _parts(args, folder, model, tokenizer, read) -> list[Part]:
    parts: list[Part] = []
    known = model.get_input_embeddings().num_embeddings
    asked = argparse.Namespace(model=folder, seq_length=args.seq_length, stride=None, eval_tokens=args.tokens)
    first = 0
    for named, text in read:
        if int(text.tokens.max()) >= known:
            raise UsageError(f"{named.path} has the token id {text.tokens.max()}, the model has {known:,} ids")
        windows = folders.choose_windows(asked, model.config, tokenizer, len(text.tokens) - 1)
        parts.append(Part(named, text, windows, first))
        first += len(windows)
    return parts


def about_of(args, folder, name, model, found, tokenizer, parts, dtype) -> About:
    """What the recording will say, but for what the writer counts."""
    kind, config = found.kind, model.config.get_text_config()
    layer = getattr(next(iter(found.modules.values())), "layer", None)
    own = layer.own_state_size(layer.config) if layer is not None else 0
    card = {key: value for key, value in config.to_dict().items() if _plain(value)}
    return About(
        name=name,
        model=str(folder),
        router_type=kind.router_type,
        recurrent=bool(own),
        layers=list(found.modules),
        experts=kind.experts,
        topk=kind.topk,
        null_experts=kind.null_experts,
        hidden_size=config.hidden_size,
        state_size=own,
        tokenizer={"kind": "bytes" if texts.is_bytes(tokenizer) else type(tokenizer).__name__},
        data=[data_entry(part.named, part.text.tokens[: part.windows.predicted]) for part in parts],
        seq_length=parts[0].windows.size,
        score_function=kind.score_function,
        config={**card, "computed_in": dtype},
    )


def _plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_plain(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(_plain(inner) for inner in value)
    return value is None or isinstance(value, (bool, int, float, str))


@torch.inference_mode()
def _pass(model, found: routers.Found, parts: list[Part], batch: int, device, writer: Writer) -> bool:
    stream = progress_stream()
    total = sum(part.windows.predicted for part in parts)
    with (
        _Watch(model, found) as watch,
        noted_signals() as received,
        tqdm(
            total=total,
            desc=f"recording {writer.about.name}",
            unit=" tokens",
            unit_scale=True,
            file=stream,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.1 if hasattr(stream, "isatty") else 30,
        ) as bar,
    ):
        for part, first, chosen in _batches(parts, batch):
            if received:
                return False
            ids_BS, _ = batch_of(part.text.tokens, chosen)
            watch.clear()
            logits_BSV = model(input_ids=ids_BS.to(device), use_cache=False).logits
            kept_T = _kept(chosen, ids_BS.shape[1])
            tokens = int(kept_T.sum())
            predicted_T = logits_BSV.argmax(-1).flatten().cpu()[kept_T].numpy()
            writer.write(**_rows(part, first, chosen), predicted_T=predicted_T, **watch.columns(kept_T))
            bar.update(tokens)
    return True


def _batches(parts: list[Part], batch: int) -> Iterator[tuple[Part, int, list[Window]]]:
    """Windows that go in at once, and the number of their first, over all texts."""
    for part in parts:
        for start in range(0, len(part.windows), batch):
            stop = min(start + batch, len(part.windows))
            yield part, part.first + start, [part.windows[index] for index in range(start, stop)]


def _kept(chosen: list[Window], longest: int) -> torch.Tensor:
    """Bool [B S]: not padding."""
    lengths = torch.tensor([window.length for window in chosen])
    return (torch.arange(longest)[None] < lengths[:, None]).flatten()


def _rows(part: Part, first: int, chosen: list[Window]) -> dict[str, np.ndarray]:
    tokens, start, end = part.text.tokens, chosen[0].start, chosen[-1].end
    return {
        "token_T": tokens[start:end],
        "next_token_T": tokens[start + 1 : end + 1],
        "position_T": np.concatenate([np.arange(window.length) for window in chosen]),
        "window_T": np.repeat(np.arange(first, first + len(chosen)), [window.length for window in chosen]),
        "domain_T": np.full(end - start, part.named.label),
    }


class _Watch:
    """Keeps what each router did in the last forward pass."""

    def __init__(self, model: torch.nn.Module, found: routers.Found) -> None:
        self._found, self._states = found, StateWatch(model.modules())
        self._carries = carries(getattr(next(iter(found.modules.values())), "layer", None))
        self._numbers = {module: number for number, module in found.modules.items()}
        self._seen: dict[int, tuple[Choice, Any]] = {}
        self._hooks = [module.register_forward_hook(self._keep) for module in found.modules.values()]

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._states.remove()

    def clear(self) -> None:
        """Before a forward pass."""
        self._seen.clear()

    def columns(self, kept_T: torch.Tensor) -> dict[str, np.ndarray]:
        """Of the last forward pass, for the writer. Raises RuntimeError where a router has not run."""
        if self._seen.keys() != set(self._found.modules):
            raise RuntimeError("a router has not run in this forward pass")
        seen = [self._seen[number] for number in self._found.modules]

        def stacked(arrays) -> np.ndarray:
            return np.stack([array.cpu()[kept_T].numpy() for array in arrays], axis=1)

        columns = {
            "choices_TLK": stacked(choice.choices_TK for choice, _ in seen),
            "scores_TLE": stacked(choice.scores_TE for choice, _ in seen),
            "margin_TL": stacked(choice.margin_T for choice, _ in seen),
        }
        for name in self._carries:
            columns[f"{name}_TL"] = stacked(getattr(carried, f"{name}_T") for _, carried in seen)
        return columns

    def _keep(self, module: torch.nn.Module, _inputs: tuple, output: tuple) -> None:
        carried = self._states.take(getattr(module, "layer", None))
        self._seen[self._numbers[module]] = self._found.choice(module, output), carried
