"""Measures of the weights that a recording keeps: how alike experts are, and a router's rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmoe_megablocks.analysis.measures import weights as measures
from rmoe_megablocks.analysis.measuring.entries import CLOSED, PAPER, entry


def entries(about: Any, weights: Mapping[str, np.ndarray]) -> dict:
    """``expert_similarity`` and ``router_similarity`` [L] of those matrices [L, E, E] that ``weights`` has."""
    found = {}
    if (similarity := weights.get("expert_similarity_LEE")) is not None:
        random = weights.get("expert_random_LEE")
        chance = [3 / about.experts] * len(similarity) if random is None else [measures.paper_mean(o) for o in random]
        others = [0.0] * len(similarity) if random is None else [measures.mean_of_others(one) for one in random]
        found["expert_similarity"] = entry(
            [measures.paper_mean(one) for one in similarity],
            ["layer"],
            "cosine x 3",
            baseline=chance,
            baseline_is=f"{CLOSED}: independent experts have 3/E" if random is None else "random experts",
            source=PAPER,
            note="the paper's figure, mean of all products with the diagonal, so that 3/E is there before any "
            "likeness. `without_diagonal` [L]: mean cosine of two different experts, 0 by chance.",
            without_diagonal=[measures.mean_of_others(one) for one in similarity],
            without_diagonal_baseline=others,
        )
    if (similarity := weights.get("router_similarity_LEE")) is not None:
        found["router_similarity"] = entry(
            [measures.mean_of_others(one) for one in similarity],
            ["layer"],
            "cosine",
            baseline=0.0,
            baseline_is=f"{CLOSED}: independent Gaussian rows",
            source="mean cosine of two different rows of a layer's router",
            note="of recurrent types the rows read the state, of linear ones the hidden state: not the same space.",
        )
    return found
