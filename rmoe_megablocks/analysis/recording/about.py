"""What a recording says of itself, and the columns of its shards."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmoe_megablocks.errors import UsageError

FORMAT = 1
RECORDING = "recording.json"
WEIGHTS = "weights.npz"
VOCABULARY = "vocabulary.json"

#: of every recording: one number a token, in shards of this type
TOKEN_COLUMNS = {"token": "int32", "next_token": "int32", "predicted": "int32", "position": "int32", "window": "int32"}
DOMAIN = "domain"
#: of recurrent types: one number a token and layer
LAYER_COLUMNS = ("state_norm", "update_gate", "reset_gate")


@dataclass
class About:
    """``recording.json``.

    Attributes:
        layers: number, from 1, of each of the model's layers that has experts, L of them.
        experts, topk, null_experts: E real experts, K choices a token, M null experts beside them.
        state_size: width of the routing state, 0 without one.
        iteration: of the checkpoint, None where nobody says.
        tokenizer: at least ``kind``.
        data: one entry a text: label, name, tokens, sha256 (of the token ids).
        seq_length: most tokens of a window.
        tokens: rows of all shards.
        score_function: softmax (scores of a token add up to 1 over real and null experts) or sigmoid.
        config: the model's settings, as far as they are plain values.
        complete: False of a recording that was interrupted.
        shards: file names, in text order.
    """

    name: str
    model: str
    router_type: str
    recurrent: bool
    layers: list[int]
    experts: int
    topk: int
    null_experts: int = 0
    hidden_size: int = 0
    state_size: int = 0
    iteration: int | None = None
    tokenizer: dict[str, Any] = field(default_factory=lambda: {"kind": "unknown"})
    data: list[dict[str, Any]] = field(default_factory=list)
    seq_length: int = 0
    tokens: int = 0
    score_function: str = "softmax"
    config: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    complete: bool = False
    shards: list[str] = field(default_factory=list)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Writes ``recording.json``, which is there whole or as it was before."""
        replace_text(folder / RECORDING, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> About:
        """Raises UsageError for a folder without one, or one that this version does not read."""
        path = folder / RECORDING
        try:
            said = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UsageError(f"{folder} is no recording: it has no {RECORDING}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as JSON ({error})") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            found = said.get("format") if isinstance(said, dict) else None
            raise UsageError(f"{path} has the format {found!r}, this version reads {FORMAT}: record it again")
        fields = {one.name: one for one in dataclasses.fields(cls)}
        needed = {name for name, one in fields.items() if _has_no_default(one)}
        if missing := sorted(needed - said.keys()):
            raise UsageError(f"{path} lacks {missing[0]}: record it again")
        about = cls(**{name: value for name, value in said.items() if name in fields})
        if wrong := about._wrong():
            raise UsageError(f"{path}: {wrong}: record it again")
        return about

    def _wrong(self) -> str | None:
        whole = {name: getattr(self, name) for name in ("experts", "topk", "null_experts", "tokens")}
        for name, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                return f"{name} is {value!r}"
        if not self.experts or not self.topk:
            return "there are no experts"
        if not isinstance(self.layers, list) or not all(isinstance(layer, int) for layer in self.layers):
            return f"layers is {self.layers!r}"
        if not self.layers:
            return "there is no layer with experts"
        names = self.shards if isinstance(self.shards, list) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            return f"shards is {self.shards!r}"
        return None


class ToldAlready(Exception):
    """Another process failed with the exit code ``code``, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _has_no_default(one: dataclasses.Field) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def replace_text(path: Path, text: str) -> None:
    """Writes a file under another name first."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def need(*packages: str) -> None:
    """Raises UsageError where one of the packages of the extra ``analyze`` is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed: pip install 'rmoe-megablocks[analyze]'")
