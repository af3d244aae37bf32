"""The sizes of a routing step that are measured: one declared table."""

from dataclasses import dataclass

import torch

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Size:
    """One routing step of T tokens: hidden states [T, H] and a state [T, P] in, logits [T, E] and a state out.

    Attributes:
        summary: whose size it is.
        hidden_size, state_size, experts: H, P, E.
        hidden: dtype of hidden states and parameters.
        state: dtype of x', state and logits that is asked for (``--moe-router-dtype``).
        tokens: T, those measured unless ``--tokens`` says otherwise.
        device: the kind of device on which it is measured unless named.
    """

    summary: str
    hidden_size: int
    state_size: int
    experts: int
    hidden: torch.dtype
    state: torch.dtype
    tokens: tuple[int, ...]
    device: str

    @property
    def dtypes(self) -> str:
        """As "bf16, state fp32"."""
        words = {FP32: "fp32", BF16: "bf16"}
        return words[self.hidden] + (f", state {words[self.state]}" if self.state != self.hidden else "")


SIZES = {
    "0.9b": Size("the paper's 0.91B model", 1280, 128, 16, FP32, FP32, (4096, 8192), "cpu"),
    "small": Size("the paper's medium enwik8 model", 352, 128, 16, FP32, FP32, (4096,), "cpu"),
    "0.9b_bf16": Size("the paper's 0.91B model", 1280, 128, 16, BF16, BF16, (16384,), "cuda"),
    "0.9b_mixed": Size("the same, fp32 routing", 1280, 128, 16, BF16, FP32, (16384,), "cuda"),
    "e64_mixed": Size("wider, 64 experts", 2048, 128, 64, BF16, FP32, (16384,), "cuda"),
    "e256_mixed": Size("256 experts", 1280, 128, 256, BF16, FP32, (16384,), "cuda"),
    "p256_mixed": Size("a state of 256", 4096, 256, 64, BF16, FP32, (16384,), "cuda"),
}
#: measured where no --sizes are named
DEFAULT = {"cpu": ("0.9b",), "cuda": ("0.9b_bf16", "0.9b_mixed")}
