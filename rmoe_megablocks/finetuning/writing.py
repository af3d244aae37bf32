"""The folder of a fine-tuned model: of the kind that it came from, with what its training came to."""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl

from rmoe_megablocks.conversion import partial
from rmoe_megablocks.conversion.folder.checksums import CHECKSUMS, sha256
from rmoe_megablocks.finetuning import examples
from rmoe_megablocks.huggingface import RmoeConfig
from rmoe_megablocks.huggingface.folders.standalone import write_code

_CARD = "README.md"
_PADDING = "megatron_padding.safetensors"  # conversion/folder/shards.py, whose import would take Megatron's
_SHARD = "4GB"


@dataclass(frozen=True)
class Saved:
    """The folder's own configurations: the Trainer writes into the model's."""

    config: Any
    generation_config: Any


@dataclass(frozen=True)
class Told:
    """Attributes:
    steps, tokens, seconds: of all sessions; of tokens, padding does not count.
    rows, skipped, cut: that were trained on, had no label, lost their end.
    predicted: labels of an epoch.
    first, last: mean losses of a label in the first and the last step, nats.
    frozen: parameters left as they were.
    """

    steps: int
    tokens: int
    rows: int
    skipped: int
    cut: int
    predicted: int
    first: float
    last: float
    frozen: int
    seconds: float


def write(args: argparse.Namespace, place: Path, model: torch.nn.Module, tokenizer: Any, saved: Saved, told: Told):
    """Everything but the checksums."""
    said = json.loads((args.model / "config.json").read_bytes())
    dtype = str(said.get("dtype") or said.get("torch_dtype") or "float32")
    model.config, model.generation_config = saved.config, saved.generation_config
    if not tokenizer.chat_template:
        _end_with(examples.end_of_response(tokenizer), model)
        tokenizer.chat_template = examples.as_jinja(tokenizer)
    model.to("cpu", getattr(torch, dtype)).eval()
    model.save_pretrained(place, max_shard_size=_SHARD)
    mask = os.umask(0)  # safetensors makes files that nobody else may read
    os.umask(mask)
    for path in place.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)
    if type(model.config) is RmoeConfig:
        try:
            write_code(place, model.config)
        except ValueError as error:  # a router type of somebody's module
            partial.say(f"no code beside the weights: {error}")
    tokenizer.save_pretrained(place)
    if (args.model / _PADDING).is_file():
        shutil.copyfile(args.model / _PADDING, place / _PADDING)
    summary = summary_of(args, told)
    (place / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    card = args.model / _CARD
    text = card.read_text() if card.is_file() else f"# {args.model.name}\n"
    lines = "".join(f"| {name} | {value} |\n" for name, value in summary.items() if name != "versions")
    (place / _CARD).write_text(f"{text.rstrip()}\n\n## Fine-tuned on {args.data.name}\n\n| | |\n|---|---|\n{lines}")


def _end_with(token: int, model: torch.nn.Module) -> None:
    """Has generation stop at what responses end in, too."""
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    if token not in known:
        eos = [*known, token] if known else token
        model.config.eos_token_id = model.generation_config.eos_token_id = eos


def summary_of(args: argparse.Namespace, told: Told) -> dict[str, Any]:
    """What summary.json says."""
    kept = asdict(told)
    return {
        "iterations": kept.pop("steps"),
        "tokens": kept.pop("tokens"),
        "seconds": round(kept.pop("seconds"), 3),
        "seed": args.seed,
        "first_lm_loss": kept.pop("first"),
        "last_lm_loss": kept.pop("last"),
        "labels_an_epoch": kept.pop("predicted"),
        "frozen_parameters": kept.pop("frozen"),
        "rows": kept.pop("rows"),
        "rows_left_out": kept.pop("skipped"),
        "responses_cut": kept.pop("cut"),
        "aux_loss_coefficient": args.aux_loss,
        "dtype": args.dtype,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate)},
    }


def write_checksums(place: Path) -> None:
    """SHA256SUMS of all files of the folder."""
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    names = [name for name in names if name != CHECKSUMS and not partial.is_ours(name)]
    (place / CHECKSUMS).write_text("".join(f"{sha256(place / name)}  {name}\n" for name in names))


def tell(args: argparse.Namespace, told: Told) -> None:
    """Two lines on standard output."""
    print(f"{args.out}: {told.steps:,} steps, {told.rows:,} rows, {told.predicted:,} labels an epoch")
    print(f"loss of a response's token: {told.first:.4f} in the first step, {told.last:.4f} in the last")
