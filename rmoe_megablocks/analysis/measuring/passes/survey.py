"""The first pass over a recording, over tokens alone.

It finds how long the text is, its windows and domains, and how often each token id occurs: what a shuffle or an
even sample has to know before the first token is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measuring.options import Options
from rmoe_megablocks.analysis.measuring.passes.sampling import Deck
from rmoe_megablocks.errors import UsageError

#: what a token is labelled by: the name in measures.json, and the batch's array
KINDS = {"input_token": "token_T", "next_token": "next_token_T", "predicted_token": "predicted_T"}
_COLUMNS = ("token", "next_token", "predicted", "window", "domain")


@dataclass
class Survey:
    """What one pass over the tokens tells.

    Attributes:
        tokens: rows.
        starts_U: first row of each unit, a stretch of one window and one domain.
        domain_U: its domain, as a place in ``domains``.
        shuffled_domain_U: the same in another order of the units.
        block_U: its part of the text, 0 to ``blocks - 1``. Each domain is cut into as many parts of whole windows, one
            behind the other, and the n-th parts of all domains are one block: drawing blocks keeps the domains' shares.
        blocks: how many.
        domains: names.
        counts: by kind, how often each token id occurs, [largest id + 1].
    """

    tokens: int
    starts_U: np.ndarray
    domain_U: np.ndarray
    shuffled_domain_U: np.ndarray
    block_U: np.ndarray
    blocks: int
    domains: list[str]
    counts: dict[str, np.ndarray]

    def units(self, start: int, stop: int) -> np.ndarray:
        """[T] of the rows from ``start`` on: in which unit."""
        return np.searchsorted(self.starts_U, np.arange(start, stop), side="right") - 1


def survey(recording: Any, options: Options) -> Survey:
    """One pass over ids, windows and domains.

    Raises:
        UsageError: no token, fewer rows than the recording says it has, or too many to shuffle.
    """
    total, windows, starts, codes = 0, [], [], []
    names: dict[str, int] = {}
    counts = {kind: np.zeros(0, np.int64) for kind in KINDS}
    last = None
    for batch in recording.batches(columns=list(_COLUMNS)):
        domain_T, last_domains = _codes(batch.domain_T, names), np.asarray(batch.window_T)
        change = np.flatnonzero((np.diff(domain_T) != 0) | (np.diff(last_domains) != 0)) + 1
        first = [0] if len(domain_T) and (domain_T[0], last_domains[0]) != last else []
        new = np.concatenate([np.asarray(first, np.int64), change])
        starts.append(new + total)
        codes.append(domain_T[new])
        windows.append(last_domains[new])
        if len(domain_T):
            last = (domain_T[-1], last_domains[-1])
        for kind, name in KINDS.items():
            ids = getattr(batch, name, None)
            counts[kind] = _added(counts[kind], ids) if ids is not None else counts[kind]
        total += len(domain_T)
    _check(recording, total)
    domain_U = np.concatenate(codes)
    block_U, blocks = _blocks(domain_U, len(names), options.blocks)
    shuffled = np.random.default_rng(options.seed).permutation(domain_U)
    return Survey(total, np.concatenate(starts), domain_U, shuffled, block_U, blocks, list(names), counts)


def _check(recording: Any, total: int) -> None:
    name = recording.about.name
    if not total:
        raise UsageError(f"{name}: the recording has no token")
    if total != recording.about.tokens:
        raise UsageError(f"{name}: the recording has {total} tokens and says {recording.about.tokens}: record it again")
    if total > Deck.LARGEST:
        raise UsageError(f"{name}: {total} tokens are more than can be shuffled ({Deck.LARGEST}): record fewer")


def _codes(domain_T: Any, names: dict[str, int]) -> np.ndarray:
    """Domains as numbers in the order in which they are met; ``names`` grows."""
    found, index = np.unique(np.asarray(domain_T).astype(str), return_inverse=True)
    first = np.full(len(found), len(index))
    np.minimum.at(first, index, np.arange(len(index)))
    for place in np.argsort(first):
        names.setdefault(str(found[place]), len(names))
    return np.array([names[str(name)] for name in found], np.int64)[index]


def _added(counts_V: np.ndarray, ids_T: np.ndarray) -> np.ndarray:
    more = np.bincount(ids_T[ids_T >= 0], minlength=len(counts_V))
    more[: len(counts_V)] += counts_V
    return more


def _blocks(domain_U: np.ndarray, domains: int, blocks: int) -> tuple[np.ndarray, int]:
    """As many as the domain with the fewest windows allows, so that none is without a domain."""
    sizes = np.bincount(domain_U, minlength=domains)
    blocks = int(min(blocks, sizes.min()))
    result = np.empty(len(domain_U), np.int64)
    for domain in range(domains):
        places = np.flatnonzero(domain_U == domain)
        result[places] = np.arange(len(places)) * blocks // len(places)
    return result, blocks
