"""Every measure of one recording."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from rmoe_megablocks.analysis.measuring import similarity
from rmoe_megablocks.analysis.measuring.entries import plain
from rmoe_megablocks.analysis.measuring.figures import figures
from rmoe_megablocks.analysis.measuring.options import Options
from rmoe_megablocks.analysis.measuring.passes.pieces import pieces
from rmoe_megablocks.analysis.measuring.passes.survey import Survey, survey
from rmoe_megablocks.analysis.measuring.streams.gates import Gates
from rmoe_megablocks.analysis.measuring.streams.information import Information
from rmoe_megablocks.analysis.measuring.streams.labels import Labels
from rmoe_megablocks.analysis.measuring.streams.loads import Loads
from rmoe_megablocks.analysis.measuring.streams.pairs import Pairs
from rmoe_megablocks.analysis.measuring.streams.paths import Paths
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.process import progress_stream

FORMAT = 1
_FEW = 8  # blocks below which a bootstrap says nothing


def measure(recording: Any, options: Options | None = None) -> dict[str, Any]:
    """Every measure that the recording allows, in two passes, with memory that does not grow with its tokens (but for
    the paths: ``options.path_tokens``).

    Args:
        recording: what ``recording.reading.Recording`` offers: ``about``, ``batches(columns)``, ``weights``.
        options: how much of it goes into what is dear.

    Returns:
        what measures.json holds: ``recording``, ``options``, ``layers``, ``measures`` by name, ``figures``, one a
        measure, ``left_out``, what is not there and why, and ``bootstrap``: figures of resampled blocks of the text.

    Raises:
        UsageError: an empty or damaged recording, or one expert alone.
    """
    options = options or Options()
    about = recording.about
    if about.experts < 2:
        raise UsageError(f"{about.name}: one expert leaves nothing to route (a dense model?)")
    found = survey(recording, options)
    streams = _streams(about, found, options)
    with tqdm(
        total=found.tokens,
        desc=f"measuring {about.name}",
        unit="token",
        unit_scale=True,
        file=progress_stream(),
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        leave=False,
    ) as bar:
        for piece in pieces(recording, found, options):
            for stream in streams.values():
                stream.add(piece)
            bar.update(piece.stop - piece.start)
    if "paths" in streams:
        streams["paths"].look_up(recording)
    measures = {}
    for stream in streams.values():
        measures |= stream.entries()
    measures |= similarity.entries(about, recording.weights)
    return {
        "format": FORMAT,
        "recording": plain(_as_dict(about)),
        "options": dataclasses.asdict(options),
        "layers": list(about.layers),
        "tokens": found.tokens,
        "domains": found.domains,
        "measures": measures,
        "figures": figures(measures),
        "left_out": _left_out(measures, about, found),
        "bootstrap": _bootstrap(streams, found, options),
    }


def _streams(about: Any, found: Survey, options: Options) -> dict[str, Any]:
    streams = {
        "information": Information(about, found, options),
        "gates": Gates(about, found.blocks),
        "loads": Loads(about, found, options.batch_tokens, options.seed),
        "pairs": Pairs(about, found.blocks),
        "labels": Labels(about, found, options.table_bytes, options.seed),
    }
    if len(about.layers) > 1:
        streams["paths"] = Paths(about, found.tokens, options.path_tokens, options.seed)
    return streams


def _left_out(measures: dict, about: Any, found: Survey) -> dict[str, str]:
    reasons = dict.fromkeys(
        ("state_norm", "update_gate", "reset_gate"), f"a {about.router_type} router has none, or none was recorded"
    ) | {
        "margin": "none was recorded",
        "domain_specialisation": f"one domain ({found.domains[0]})",
        "vocabulary_specialisation": "no token id was recorded",
        "predictability": "the text is one window: nothing to hold out",
        "expert_similarity": "no weights were recorded",
        "router_similarity": "no weights were recorded",
    }
    if len(about.layers) == 1:
        reasons |= dict.fromkeys(("transitions", "paths", "predictability"), "one MoE layer: nothing between layers")
    return {name: why for name, why in reasons.items() if name not in measures}


def _bootstrap(streams: dict, found: Survey, options: Options) -> dict[str, Any]:
    """Figures of ``resamples`` texts of as many blocks, drawn with replacement; the same draws for all recordings of
    one text, so that their differences are those of pairs."""
    if found.blocks < _FEW:
        return {"blocks": found.blocks, "why_not": f"{found.blocks} blocks of windows are too few", "values": {}}
    draws = np.random.default_rng(options.seed).integers(found.blocks, size=(options.resamples, found.blocks))
    weights = np.stack([np.bincount(row, minlength=found.blocks) for row in draws]).astype(np.float64)
    values = {}
    for stream in streams.values():
        values |= stream.scalars(weights)
    return {
        "blocks": found.blocks,
        "unit": "contiguous blocks of windows, within each domain",
        "values": {name: plain(np.round(np.asarray(rows, np.float64), 7)) for name, rows in values.items()},
    }


def _as_dict(about: Any) -> dict:
    return dataclasses.asdict(about) if dataclasses.is_dataclass(about) else dict(vars(about))
