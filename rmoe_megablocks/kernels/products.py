"""Matrix products of two-byte operands with an fp32 result, by tensor cores where there are some.

A product of two bf16 or fp16 numbers is exact in fp32, so that nothing is lost but the order of additions. torch has
the operation on CUDA alone (``out_dtype``); elsewhere the operands are converted.
"""

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in fp32, both of one dtype."""
    if a.dtype in LOW and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def addmm_fp32(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] or [N] + a [M, K] @ b [K, N] in fp32; ``total`` in fp32 already."""
    if a.dtype in LOW and a.device.type == "cuda":
        return torch.addmm(total, a, b, out_dtype=torch.float32)
    return torch.addmm(total, a.float(), b.float())
