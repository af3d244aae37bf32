"""Writes a recording, shard by shard: what there is at any moment is a recording that says it is not complete."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmoe_megablocks.analysis.recording.about import (
    DOMAIN,
    LAYER_COLUMNS,
    RECORDING,
    TOKEN_COLUMNS,
    VOCABULARY,
    WEIGHTS,
    About,
    need,
    replace_text,
)
from rmoe_megablocks.errors import UsageError

SHARD_ROWS = 65_536
_GROUP_ROWS = 8_192  # what a reader has in memory at once
_PER_LAYER = {
    "choices": np.int16,
    "scores": np.float16,
    "margin": np.float32,
    **dict.fromkeys(LAYER_COLUMNS, np.float32),
}


def new_folder(folder: Path) -> None:
    """Raises UsageError for one that holds something: nothing is written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a recording" if (folder / RECORDING).is_file() else "something else"
        raise UsageError(f"{folder} holds {what} already: name another --out, or remove it")


class Writer:
    """A recording in the making.

    ``write`` takes rows in text order, as many at once as there are; ``finish`` says that these were all. Memory: the
    rows of one shard.
    """

    def __init__(self, folder: Path, about: About, rows: int = SHARD_ROWS) -> None:
        """Makes ``folder``. Raises UsageError if it holds something, or pyarrow is missing."""
        need("pyarrow")
        new_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from None
        self.folder, self.rows = folder, rows
        self.about = dataclasses.replace(about, complete=False, tokens=0, shards=[])
        self._pieces: list[dict[str, np.ndarray]] = []
        self._waiting = 0
        self._names: tuple[str, ...] | None = None
        self._seen: set[int] = set()
        self.about.save(folder)

    def write(
        self,
        *,
        token_T: np.ndarray,
        next_token_T: np.ndarray,
        position_T: np.ndarray,
        window_T: np.ndarray,
        domain_T: np.ndarray,
        choices_TLK: np.ndarray,
        scores_TLE: np.ndarray,
        margin_TL: np.ndarray,
        predicted_T: np.ndarray | None = None,
        state_norm_TL: np.ndarray | None = None,
        update_gate_TL: np.ndarray | None = None,
        reset_gate_TL: np.ndarray | None = None,
    ) -> None:
        """Adds T rows. Raises ValueError for arrays of other tokens, layers, experts than the recording's."""
        tokens = len(token_T)
        predicted_T = np.full(tokens, -1) if predicted_T is None else predicted_T
        piece = {
            "token": token_T,
            "next_token": next_token_T,
            "predicted": predicted_T,
            "position": position_T,
            "window": window_T,
        }
        piece = {name: np.asarray(array, np.int32) for name, array in piece.items()}
        piece[DOMAIN] = np.asarray(domain_T)
        layers, experts, topk = len(self.about.layers), self.about.experts, self.about.topk
        given = {
            "choices": (choices_TLK, (layers, topk)),
            "scores": (scores_TLE, (layers, experts)),
            "margin": (margin_TL, (layers,)),
            "state_norm": (state_norm_TL, (layers,)),
            "update_gate": (update_gate_TL, (layers,)),
            "reset_gate": (reset_gate_TL, (layers,)),
        }
        for name, (array, shape) in given.items():
            if array is None:
                continue
            array = np.asarray(array)
            if array.shape != (tokens, *shape):
                raise ValueError(f"{name}: expected {[tokens, *shape]}, got {list(array.shape)}")
            piece[name] = np.ascontiguousarray(array, _PER_LAYER[name])
        for name, array in piece.items():
            if len(array) != tokens:
                raise ValueError(f"{name}: {len(array)} rows beside {tokens} tokens")
        names = tuple(piece)
        if self._names not in (None, names):
            raise ValueError(f"columns {names} behind rows of columns {self._names}")
        self._names = names
        self._seen.update(*(np.unique(piece[name]).tolist() for name in ("token", "next_token", "predicted")))
        self._pieces.append(piece)
        self._waiting += tokens
        while self._waiting >= self.rows:
            self._shard(self.rows)

    @property
    def token_ids(self) -> list[int]:
        """Those that occur so far, read, to be predicted or predicted."""
        return sorted(self._seen - {-1})

    def finish(
        self,
        complete: bool = True,
        weights: Mapping[str, np.ndarray] | None = None,
        vocabulary: Mapping[int, str] | None = None,
    ) -> None:
        """Writes what is left. Without it, as after a kill, the recording ends with its last whole shard."""
        if self._waiting:
            self._shard(self._waiting)
        if weights:
            np.savez(self.folder / WEIGHTS, **weights)
        if vocabulary is not None:
            texts = {str(number): text for number, text in vocabulary.items()}
            replace_text(self.folder / VOCABULARY, json.dumps(texts, ensure_ascii=False) + "\n")
        self.about.complete = complete
        self.about.save(self.folder)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error) -> None:
        """After an error: what is written stays, and says that it is partial; of nothing, nothing is left."""
        if kind is not None and not self.about.shards:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _shard(self, rows: int) -> None:
        import pyarrow.parquet as parquet

        table = _table(self._take(rows))
        name = f"part-{len(self.about.shards):05}.parquet"
        path = self.folder / name
        parquet.write_table(
            table,
            path.with_suffix(".part"),
            compression="zstd",
            use_dictionary=[DOMAIN],  # numbers hardly repeat: their dictionaries would be thrown away again
            row_group_size=_GROUP_ROWS,
            write_page_checksum=True,
        )
        path.with_suffix(".part").replace(path)
        self.about.shards.append(name)
        self.about.tokens += rows
        self.about.save(self.folder)

    def _take(self, rows: int) -> dict[str, np.ndarray]:
        """The first ``rows`` of what waits."""
        taken: list[dict[str, np.ndarray]] = []
        missing = rows
        while missing:
            piece = self._pieces[0]
            if len(piece["token"]) <= missing:
                taken.append(self._pieces.pop(0))
            else:
                taken.append({name: array[:missing] for name, array in piece.items()})
                self._pieces[0] = {name: array[missing:] for name, array in piece.items()}
            missing -= len(taken[-1]["token"])
        self._waiting -= rows
        return {name: np.concatenate([piece[name] for piece in taken]) for name in taken[0]}


def _table(columns: Mapping[str, np.ndarray]):
    import pyarrow

    arrays = {}
    for name, array in columns.items():
        if name in TOKEN_COLUMNS:
            arrays[name] = pyarrow.array(array)
        elif name == DOMAIN:
            labels, places = np.unique(array, return_inverse=True)
            arrays[name] = pyarrow.DictionaryArray.from_arrays(
                pyarrow.array(places.astype(np.int32)), pyarrow.array(labels.tolist(), pyarrow.string())
            )
        else:
            width = array[:1].size
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), width)
    return pyarrow.table(arrays)
