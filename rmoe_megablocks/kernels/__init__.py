"""The routing step's operations, each beside the naive form it is tested against."""

from rmoe_megablocks.kernels.gru_route import gru_route
from rmoe_megablocks.kernels.gru_route import why_not as why_not_triton
from rmoe_megablocks.kernels.gru_step import gru_step
from rmoe_megablocks.kernels.linear_in_dtype import linear_in_dtype
from rmoe_megablocks.kernels.triton.tables import LARGEST_SIZE

__all__ = ["LARGEST_SIZE", "gru_route", "gru_step", "linear_in_dtype", "why_not_triton"]
