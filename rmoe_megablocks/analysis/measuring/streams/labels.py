"""Which experts a token id's choices go to: the id read, the next one, the one predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measuring.entries import entry
from rmoe_megablocks.analysis.measuring.passes.pieces import Piece
from rmoe_megablocks.analysis.measuring.passes.sampling import Deck
from rmoe_megablocks.analysis.measuring.passes.survey import KINDS, Survey


class _Table:
    """Counts [ids, L, E] of one kind of label, and of the same labels in another order of the tokens."""

    def __init__(self, counts_V: np.ndarray, layers: int, experts: int, most: int, seed: int) -> None:
        order = np.argsort(-counts_V, kind="stable")
        kept = np.sort(order[: min(most, int((counts_V > 0).sum()))])
        self.tokens = int(counts_V.sum())
        self.tokens_V = counts_V[kept]
        self.left_out = int((counts_V > 0).sum()) - len(kept)
        self._row = np.full(len(counts_V), len(kept), np.int64)  # those left out share the last row
        self._row[kept] = np.arange(len(kept))
        self._deck = Deck(np.append(self.tokens_V, self.tokens - self.tokens_V.sum()), seed)
        self.counts = np.zeros((len(kept) + 1, layers, experts), np.uint32)
        self.shuffled = np.zeros_like(self.counts)

    def add(self, ids_T: np.ndarray, chosen_TLK: np.ndarray) -> None:
        labelled = ids_T >= 0
        chosen = chosen_TLK[labelled]
        self._count(self.counts, self._row[ids_T[labelled]], chosen)
        self._count(self.shuffled, self._deck.deal(len(chosen)), chosen)

    @staticmethod
    def _count(table_VLE: np.ndarray, rows_T: np.ndarray, chosen_TLK: np.ndarray) -> None:
        _, layers, experts = table_VLE.shape
        places = (rows_T[:, None] * layers + np.arange(layers))[:, :, None] * experts + chosen_TLK
        np.add.at(table_VLE.reshape(-1), places[chosen_TLK >= 0], np.uint32(1))

    def favourites(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """[L] each: the share that an id's K favourite experts have, mean over tokens; the same of the shuffled."""
        return tuple(self._favourites(table, k) for table in (self.counts, self.shuffled))

    def _favourites(self, table_VLE: np.ndarray, k: int) -> np.ndarray:
        result, total = np.zeros(table_VLE.shape[1]), max(int(self.tokens_V.sum()), 1)
        for layer in range(len(result)):  # one at a time: floats of all would need eight times the table
            counts = table_VLE[:-1, layer].astype(np.float64)
            best = np.sort(counts, axis=1)[:, -k:].sum(1) / np.maximum(counts.sum(1), 1)
            result[layer] = (best * self.tokens_V).sum() / total
        return result


class Labels:
    """``vocabulary_specialisation`` [kinds, L], of the kinds that the recording has."""

    def __init__(self, about: Any, found: Survey, table_bytes: int, seed: int) -> None:
        layers, experts = len(about.layers), about.experts
        kinds = [kind for kind in KINDS if found.counts[kind].any()]
        most = max(1, table_bytes // (8 * layers * experts * max(1, len(kinds))))
        self._about = about
        self._tables = {
            kind: _Table(found.counts[kind], layers, experts, most, seed + place) for place, kind in enumerate(kinds)
        }
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    def add(self, piece: Piece) -> None:
        for kind, table in self._tables.items():
            table.add(np.asarray(piece.ids[kind]), piece.choices_TLK)

    def _shares(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        if self._found is None:
            self._found = {kind: table.favourites(self._about.topk) for kind, table in self._tables.items()}
        return self._found

    def entries(self) -> dict:
        if not self._tables:
            return {}
        shares = self._shares()
        told = [
            f" {kind}: the {table.left_out} rarest ids of {table.left_out + len(table.tokens_V)} are left out, "
            f"{1 - table.tokens_V.sum() / table.tokens:.1%} of the tokens."
            for kind, table in self._tables.items()
            if table.left_out
        ]
        return {
            "vocabulary_specialisation": entry(
                [shares[kind][0] for kind in shares],
                ["kind", "layer"],
                "share",
                baseline=[shares[kind][1] for kind in shares],
                baseline_is="token ids shuffled among all tokens",
                source="OLMoE (2409.02060)",
                note="of an id's choices, the share of its K favourite experts, mean over tokens. Rare ids look "
                "specialised by chance, so read what is above the baseline." + "".join(told),
                coordinates={"kind": list(shares)},
                ids=[len(table.tokens_V) for table in self._tables.values()],
            )
        }

    def scalars(self, weights_BJ: np.ndarray) -> dict[str, np.ndarray]:
        return {}
