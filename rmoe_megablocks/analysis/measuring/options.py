"""What a user may choose of a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from rmoe_megablocks.errors import UsageError


@dataclass(frozen=True)
class Options:
    """How much of a recording goes into what is dear, and how sure the figures are to be.

    Attributes:
        information_tokens: tokens of the mutual information, drawn evenly; 0 for all. It costs E steps a token and pair
            of layers, everything else together less.
        baseline_tokens: of the mutual information of shuffled tokens, drawn evenly; L x E bytes each are kept.
        path_tokens: of the paths, drawn evenly: their number grows with the tokens, and 24 bytes a path are kept.
        batch_tokens: of a batch, for the load of batches.
        blocks: contiguous parts of the text, of whole windows, that the bootstrap draws from.
        resamples: of the bootstrap.
        seed: of all that is drawn or shuffled.
        table_bytes: of the tables of token ids and experts; where more ids occur the rarest are left out, and said so.
    """

    information_tokens: int = 0
    baseline_tokens: int = 100_000
    path_tokens: int = 16_000_000
    batch_tokens: int = 8192
    blocks: int = 32
    resamples: int = 1000
    seed: int = 0
    table_bytes: int = 2**30

    def __post_init__(self) -> None:
        lowest = {"information_tokens": 0, "blocks": 1, "seed": 0}
        for name, value in vars(self).items():
            if value < lowest.get(name, 1):
                raise UsageError(f"{name.replace('_', ' ')} {value}: must be at least {lowest.get(name, 1)}")
