"""The routing step's operations: one dispatch point, each beside the naive form it is tested against."""

from rmoe_megablocks.kernels.gru_step import gru_step
from rmoe_megablocks.kernels.linear_in_dtype import linear_in_dtype

__all__ = ["gru_step", "linear_in_dtype"]
