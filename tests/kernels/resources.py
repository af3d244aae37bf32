"""What the Triton kernels take of a GPU, from compiling them ahead of time: no GPU and no driver is needed.

Run it in a process without TRITON_INTERPRET, with TRITON_CACHE_DIR set to a folder of your own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmoe_megablocks.kernels.triton import fused, pointwise
from rmoe_megablocks.kernels.triton.tables import BACKWARD, POINTWISE, Tile, forward_tile, padded

TARGETS = (80, 90)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_KERNELS = {
    "forward": (fused.forward, None),
    "backward": (fused.backward, BACKWARD),
    "pointwise forward": (pointwise.forward, POINTWISE),
    "pointwise backward": (pointwise.backward, POINTWISE),
}
# mode: x and h, the parameters' matrices, biases of the cell
_MODES = {
    "bf16": ("bf16", "bf16", "bf16"),
    "fp16": ("fp16", "fp16", "fp16"),
    "fp32": ("fp32", "fp32", "fp32"),
    "split": ("fp32", "bf16", "fp32"),
}


@dataclass(frozen=True)
class Case:
    """One specialisation: P and E as the model has them; h0 is the first layer's, without a previous state."""

    kernel: str
    mode: str
    size: int
    experts: int = 0
    h0: bool = False

    @property
    def products(self) -> bool:
        """Whether tensor cores have something to do in it."""
        return not self.kernel.startswith("pointwise")


# in every run of the tests; the others behind RMOE_TEST_ALL_KERNELS=1
SOME = (
    Case("forward", "bf16", 128, 16),
    Case("forward", "split", 128, 64),
    Case("backward", "split", 128),
    Case("pointwise backward", "fp32", 128),
)
ALL = (
    *(
        Case("forward", mode, size, experts)
        for mode in ("bf16", "fp16", "split")
        for size, experts in ((128, 16), (128, 64), (128, 0), (96, 16), (64, 64), (32, 16), (16, 16))
    ),
    *(Case("forward", mode, 128, 16, True) for mode in ("bf16", "split")),
    *(Case("backward", mode, size) for mode in ("bf16", "fp16", "split") for size in (128, 96, 64, 32, 16)),
    *(Case("backward", mode, 128, 0, True) for mode in ("bf16", "split")),
    *(
        Case(kernel, mode, size)
        for kernel in ("pointwise forward", "pointwise backward")
        for mode, size in (("fp32", 128), ("bf16", 256), ("fp16", 512), ("split", 512))
    ),
)


@dataclass(frozen=True)
class Resources:
    """Counted in the machine code of one case for one target."""

    registers: int
    stack: int
    local: int
    shared: int
    tensor_core: int
    wide_loads: int
    ffma: int


def compiled(case: Case, target: int) -> Resources:
    """Compiles ``case`` for compute capability ``target`` and counts."""
    function, tile = _KERNELS[case.kernel]
    tile = tile or forward_tile(target // 10)
    source = ASTSource(function, *_specialised(function, case, tile))
    kernel = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": tile.warps, "num_stages": tile.stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([_TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return Resources(
        registers=registers,
        stack=stack,
        local=count(r"\b(?:LDL|STL)\b"),
        shared=kernel.metadata.shared,
        tensor_core=count(r"\bHGMMA\b" if target >= 90 else r"\bHMMA\b"),
        wide_loads=count(r"\bLDG\S*\.128\b|\bLDGSTS\S*\.128\b"),
        ffma=count(r"\bFFMA\b"),
    )


def _specialised(function, case: Case, tile: Tile) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as a launch of :mod:`rmoe_megablocks.kernels.triton.launch` has them."""
    values, matrices, biases = _MODES[case.mode]
    split, has_h = case.mode == "split", not case.h0
    constants = {
        "P": case.size,
        "E": case.experts or 16,
        "BP": padded(case.size),
        "BE": padded(case.experts or 16),
        "BT": tile.rows,
        "BC": min(tile.columns, padded(case.size)),
        "HAS_H": has_h,
        "HAS_LOGITS": case.experts > 0,
        "HAS_ROUTER_BIAS": False,
        "SPLIT": split,
    }
    absent = {"router_bias_ptr"}
    absent |= set() if has_h else {"h_ptr", "u_ptr", "grad_h_ptr", "h_copy_ptr"}
    absent |= set() if split else {"x_copy_ptr", "h_copy_ptr"}
    absent |= set() if case.experts else {"router_ptr", "logits_ptr"}
    types = dict.fromkeys(("x_ptr", "h_ptr", "next_ptr", "logits_ptr", "grad_ptr", "grad_h_ptr"), values)
    types |= dict.fromkeys(("w_ih_ptr", "w_hh_ptr", "router_ptr", "buffer_ptr", "x_copy_ptr", "h_copy_ptr"), matrices)
    types |= dict.fromkeys(("b_ih_ptr", "b_hh_ptr"), biases)
    types |= dict.fromkeys(("a_ptr", "u_ptr", "sums_ptr"), "fp32")
    names = function.arg_names
    constants = {name: constants.get(name) for name in names if name in constants or name in absent}
    signature = {n: "constexpr" if n in constants else "i32" if n == "T" else f"*{types[n]}" for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    return signature, constants, attributes


def main() -> None:
    """Compiles :data:`SOME`, or with the word ``all`` :data:`ALL`, and prints a line of JSON for each and target."""
    cases = ALL if sys.argv[1:] == ["all"] else SOME
    for case in cases:
        for target in TARGETS:
            print(json.dumps(asdict(case) | {"target": target} | asdict(compiled(case, target))), flush=True)


if __name__ == "__main__":
    main()
