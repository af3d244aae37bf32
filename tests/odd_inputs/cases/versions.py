"""Odd versions: a checkout of another Megatron release, and a GPU's command line in CPU mode."""

from pathlib import Path

import rmoe_megablocks.compat.versions
from tests.existing_job.jobs import GRU, STOCK_SCRIPT, TRAINING
from tests.odd_inputs.case import Case

WRAPPER = "sh python -m rmoe_megablocks.megatron.run"
QUIET = "sh python -W ignore -m rmoe_megablocks.megatron.run"  # Megatron's own warnings about optional packages
TYPED = " ".join([*TRAINING, *GRU])


def checkout(version: str, files: dict[str, str] | None = None):
    """Files of a folder that Python takes for a Megatron-LM of this version."""
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    info = "".join(f"{name} = {number}\n" for name, number in numbers) + "PRE_RELEASE = ''\n"
    return {"script.py": "", "megatron/core/package_info.py": info, "megatron/core/__init__.py": "", **(files or {})}


def trained(outcome):
    assert "CPU mode adds: --distributed-backend gloo" in outcome.out
    assert "iteration        4/       4" in outcome.out, outcome.out[-2000:]


def with_linked_megatron(folder: Path) -> None:
    """A stock script beside a checkout of this release, without a compiled helper for its datasets."""
    megatron = rmoe_megablocks.compat.versions.megatron_folder()
    datasets = folder / "megatron" / "core" / "datasets"
    datasets.mkdir(parents=True)
    for below, keep in ((megatron, "core"), (megatron / "core", "datasets"), (megatron / "core" / "datasets", None)):
        for entry in below.iterdir():
            if entry.name != keep and not entry.name.startswith(("helpers_cpp", "__pycache__")):
                (folder / "megatron" / entry.relative_to(megatron)).symlink_to(entry)
    for name in (STOCK_SCRIPT.name, "stock_arguments.py"):
        (folder / name).symlink_to(STOCK_SCRIPT.parent / name)


CASES = [
    Case(
        "a checkout of Megatron-LM 0.16",
        f"{WRAPPER} script.py --moe-router-type gru",
        files=checkout("0.16.1"),
        refused=r"Megatron-Core 0\.16\.1 in .* is too old, 0\.19 to 0\.20 are supported: check out the tag core_v0",
    ),
    Case(
        "a checkout of Megatron-LM of the future, most of it renamed",
        f"{WRAPPER} script.py --moe-router-type gru",
        files=checkout("0.23.0"),
        refused=r"Megatron-Core 0\.23\.0 in .* lacks megatron\.\S+:\S+ \(.*and \d+ more: check out the tag",
    ),
    Case(
        "a checkout whose version cannot be read",
        f"{WRAPPER} script.py --moe-router-type gru",
        files={**checkout("0.19.0"), "megatron/core/package_info.py": "VERSION = read()\n"},
        refused=r"Megatron-Core unknown in .* is too old",
    ),
    Case(
        "Transformer Engine by name without a GPU",
        f"{QUIET} {STOCK_SCRIPT} {TYPED} --transformer-impl transformer_engine >/dev/null",
        refused="--transformer-impl transformer_engine does not work without a GPU: leave it out",
    ),
    Case(
        "a GPU's command line without a GPU, in a checkout without a compiled dataset helper",
        f"{WRAPPER} stock_script.py {TYPED} --distributed-backend nccl --attention-backend flash --moe-grouped-gemm",
        files=with_linked_megatron,
        env={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"},
        works=trained,
        seconds=180,
    ),
    Case(
        "an option of Megatron that was never tried with the router",
        f"{QUIET} {STOCK_SCRIPT} {TYPED} --tensor-parallel-num-weight-shards 2 >/dev/null",
        refused="--moe-router-type gru does not work with --tensor-parallel-num-weight-shards",
    ),
]
