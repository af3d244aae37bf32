"""Reads a recording, a part of a shard at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
)
from rmoe_megablocks.errors import UsageError

#: columns of every recording
ALWAYS = (*TOKEN_COLUMNS, DOMAIN, "choices", "scores", "margin")
COLUMNS = (*ALWAYS, *LAYER_COLUMNS)


@dataclass(frozen=True)
class Batch:
    """T rows; None for a column that the recording has not, or that was not asked for.

    Attributes:
        token_T, next_token_T, predicted_T: ids, int32; -1 for none, and for what was not computed.
        position_T, window_T: place in the window and number of it, from 0, over all texts; int32.
        domain_T: labels, strings.
        choices_TLK: int16, the best first; -1 for a null expert.
        scores_TLE: float16, of all experts before the selection.
        margin_TL: K-th less K+1-th selection logit, float32.
        state_norm_TL: length of the routing state; update_gate_TL, reset_gate_TL: means over its width. float32.
    """

    token_T: np.ndarray | None = None
    next_token_T: np.ndarray | None = None
    predicted_T: np.ndarray | None = None
    position_T: np.ndarray | None = None
    window_T: np.ndarray | None = None
    domain_T: np.ndarray | None = None
    choices_TLK: np.ndarray | None = None
    scores_TLE: np.ndarray | None = None
    margin_TL: np.ndarray | None = None
    state_norm_TL: np.ndarray | None = None
    update_gate_TL: np.ndarray | None = None
    reset_gate_TL: np.ndarray | None = None


_ENDINGS = {**dict.fromkeys((*TOKEN_COLUMNS, DOMAIN), "T"), "choices": "TLK", "scores": "TLE"}


def is_recording(path: Path) -> bool:
    """Whether ``path`` is a folder with a recording in it."""
    return (path / RECORDING).is_file()


class Recording:
    """A recording that is there, whole: each shard has been opened once.

    Attributes:
        about: what it says of itself.
        folder: where it lies.
        weights: matrices [L, E, E] of weights' cosines by name, maybe none.
        vocabulary: text of each token id that occurs, maybe of none.
    """

    def __init__(self, folder: Path, about: About, present: frozenset[str]) -> None:
        self.folder, self.about, self._present = folder, about, present
        self.weights = self._weights()
        self.vocabulary = self._vocabulary()

    @classmethod
    def open(cls, path: Path, warn: bool = True) -> Recording:
        """Opens a folder. A partial one is told of on standard error.

        Raises:
            UsageError: no recording, one of another format, a shard that is missing, damaged or of another one, no
                rows, pyarrow is missing.
        """
        path = Path(path)
        about = About.load(path)
        need("pyarrow")
        if not about.tokens:
            raise UsageError(f"{path}: the recording has no tokens: record it again")
        present: frozenset[str] | None = None
        rows = 0
        for name in about.shards:
            found, columns = _check_shard(path / name, about)
            if present is not None and columns != present:
                raise UsageError(f"{path / name} has other columns than the shards before it: record it again")
            present, rows = columns, rows + found
        if rows != about.tokens:
            raise UsageError(f"{path}: {RECORDING} says {about.tokens} tokens, the shards have {rows}: record it again")
        if warn and not about.complete:
            print(f"rmoe: {path} is partial: {about.tokens:,} tokens, then it was interrupted", file=sys.stderr)
        return cls(path, about, present or frozenset())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Rows in text order, at most 8,192 at once. ``columns``: names as in the shards; None for all.

        Raises:
            UsageError: a shard is damaged.
            ValueError: a column that no recording has.
        """
        import pyarrow
        import pyarrow.parquet as parquet

        if unknown := sorted(set(columns or ()) - set(COLUMNS)):
            raise ValueError(f"no recording has a column {unknown[0]!r}")
        wanted = [name for name in COLUMNS if name in self._present and (columns is None or name in columns)]
        for name in self.about.shards:
            path = self.folder / name
            try:
                with parquet.ParquetFile(path, page_checksum_verification=True) as shard:
                    for group in range(shard.num_row_groups):
                        table = shard.read_row_group(group, columns=wanted, use_threads=False)
                        batch = self._batch(table, wanted)
                        yield batch
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(path, error) from None

    def _batch(self, table, wanted: Sequence[str]) -> Batch:
        arrays = {}
        for name in wanted:
            column = table.column(name).combine_chunks()
            if name in TOKEN_COLUMNS:
                array = column.to_numpy(zero_copy_only=False)
            elif name == DOMAIN:
                array = np.array(column.dictionary.to_pylist(), str)[column.indices.to_numpy(zero_copy_only=False)]
            else:
                array = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *_shape(name, self.about))
            arrays[f"{name}_{_ENDINGS.get(name, 'TL')}"] = array
        return Batch(**arrays)

    def _weights(self) -> dict[str, np.ndarray]:
        path = self.folder / WEIGHTS
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except Exception as error:  # a damaged archive raises whatever its reader stumbles over
            raise _damaged(path, error) from None

    def _vocabulary(self) -> dict[int, str]:
        path = self.folder / VOCABULARY
        if not path.is_file():
            return {}
        try:
            return {int(number): str(text) for number, text in json.loads(path.read_bytes()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from None


def _shape(name: str, about: About) -> tuple[int, ...]:
    layers = len(about.layers)
    return {"choices": (layers, about.topk), "scores": (layers, about.experts)}.get(name, (layers,))


def _check_shard(path: Path, about: About) -> tuple[int, frozenset[str]]:
    """Rows and columns of a shard, from its footer. Raises UsageError."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema, rows = parquet.read_schema(path), parquet.read_metadata(path).num_rows
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, and {RECORDING} names it: record it again") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from None
    if missing := [name for name in ALWAYS if name not in schema.names]:
        raise UsageError(f"{path} lacks the column {missing[0]}: record it again")
    for name in schema.names:
        if name in TOKEN_COLUMNS or name not in COLUMNS or name == DOMAIN:
            continue
        width = int(np.prod(_shape(name, about)))
        found = schema.field(name).type
        if not pyarrow.types.is_fixed_size_list(found) or found.list_size != width:
            raise UsageError(f"{path}: {name} is {found}, {RECORDING} means {width} numbers a token: record it again")
    return rows, frozenset(schema.names) & frozenset(COLUMNS)


def _damaged(path: Path, error: Exception) -> UsageError:
    lines = str(error).splitlines() or [type(error).__name__]
    return UsageError(f"{path} is damaged ({lines[0][:120]}): record it again")
