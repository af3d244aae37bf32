"""What machines can do, by their vendors' data sheets, and what share of it a step gets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from rmoe_megablocks.errors import UsageError, nearest


@dataclass(frozen=True)
class Hardware:
    """A GPU in its node.

    Attributes:
        name: as it is asked for.
        gpus: of a node.
        memory: GiB of a GPU.
        flops: dense bf16 tensor-core peak, FLOP/s.
        bandwidth: of the GPU's memory, bytes/s.
        link: between GPUs of a node, bytes/s a GPU sends.
        network: between nodes, bytes/s a GPU sends.
        latency: seconds of a message between nodes.
        compute: share of ``flops`` that products get.
        reached: share of the three rates that transfers get.
    """

    name: str
    gpus: int
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    latency: float = 10e-6
    compute: float = 0.5
    reached: float = 0.8


HARDWARE = {
    one.name: one
    for one in (
        # NVIDIA A100 80GB SXM data sheet; DGX A100: NVLink 600 GB/s both ways, one 200 Gb/s adapter a GPU
        Hardware("a100-80g", 8, 80, 312e12, 2.039e12, 300e9, 25e9),
        # NVIDIA H100 SXM data sheet; DGX H100: NVLink 900 GB/s both ways, one 400 Gb/s adapter a GPU
        Hardware("h100-80g", 8, 80, 989e12, 3.35e12, 450e9, 50e9),
    )
}
_NUMBERS = [field.name for field in fields(Hardware) if field.name != "name"]


def parse(text: str) -> Hardware:
    """``a100-80g``, or with figures of one's own ``a100-80g,network=12.5e9,compute=0.4``.

    Raises:
        UsageError: one line for an unknown name, and for what is no number above 0.
    """
    name, *changes = text.split(",")
    if name not in HARDWARE:
        raise UsageError(f"--hardware {name}: known are {', '.join(HARDWARE)}{nearest(name, HARDWARE)}")
    values = {}
    for change in changes:
        key, _, number = change.partition("=")
        if key not in _NUMBERS:
            raise UsageError(f"--hardware {text}: {key!r} is none of {', '.join(_NUMBERS)}")
        try:
            values[key] = int(number) if key == "gpus" else float(number)
        except ValueError:
            values[key] = 0
        if not 0 < values[key] < float("inf") or (key in ("compute", "reached") and values[key] > 1):
            raise UsageError(f"--hardware {text}: {key} must be a number above 0, shares at most 1")
    return replace(HARDWARE[name], **values)
