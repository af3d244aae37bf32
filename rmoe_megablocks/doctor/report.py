"""The doctor's report: all checks, the features they add up to, and the command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rmoe_megablocks.doctor import checks as look
from rmoe_megablocks.doctor import probes
from rmoe_megablocks.doctor.checks import Check


@dataclass(frozen=True)
class Report:
    """All checks, and the features that they add up to."""

    checks: list[Check]
    features: dict[str, bool]

    @property
    def can_run(self) -> bool:
        """Whether the main job, ``bash launch/pretrain_rmoe.sh``, can run."""
        return all(check.state != "fault" for check in self.checks)


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add ``doctor`` to the subparsers of ``rmoe``; :func:`run` runs it."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed and supported here, and what mends each lack",
        description="What is installed and supported here, which features that gives, and what mends each lack. "
        "The exit code is 0 if the main job can run, 1 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--no-loopback", action="store_true", help="leave out the test with two processes")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if the main job can run, 1 if not."""
    report = examine(loopback=not args.no_loopback)
    if args.json:
        content = {
            "can_run": report.can_run,
            "checks": [asdict(check) for check in report.checks],
            "features": report.features,
        }
        json.dump(content, sys.stdout, indent=2)
        print()
    else:
        print(text(report))
    return 0 if report.can_run else 1


def examine(loopback: bool = True, folder: Path | None = None) -> Report:
    """Looks at this Python and this machine. ``folder``: where runs will write, the working directory by default."""
    torch = probes.ask_torch()
    gpus = torch.gpus
    checks = [
        look.check_python(),
        look.check_torch(torch),
        look.check_cuda(torch),
        look.check_gpus(gpus),
        look.check_megatron(),
        *look.check_libraries(),
        look.check_transformer_engine(bool(gpus)),
        look.check_apex(bool(gpus)),
        look.check_triton(bool(gpus)),
        *look.check_megablocks(),
        look.check_machine(),
        look.check_disk(folder or Path()),
        look.check_shared_memory(Path("/dev/shm")),
    ]
    if loopback and not torch.trouble:
        checks.append(look.check_loopback("nccl" if gpus else "gloo", min(2, len(gpus)) if gpus else 2))
    return Report(checks, features(checks, bool(gpus)))


def features(checks: Sequence[Check], gpu: bool) -> dict[str, bool]:
    """What works here, by feature."""
    good = {check.name for check in checks if check.state == "ok"}
    runs = all(check.state != "fault" for check in checks)
    return {
        "main job on CPU (gloo)": runs and not gpu,
        "main job on GPUs (NCCL)": runs and gpu,
        "fused attention and norms (Transformer Engine)": gpu and "Transformer Engine" in good,
        "grouped experts (Transformer Engine)": gpu and "Transformer Engine" in good,
        "experts of MegaBlocks": "MegaBlocks" in good,
        "fused weight gradients and Adam (Apex)": gpu and "Apex" in good,
    }


def _mark(state: str) -> str:
    return (state.upper() if state == "fault" else state).ljust(6)


def text(report: Report) -> str:
    """The report as one screen."""
    width = max(len(check.name) for check in report.checks)
    lines = []
    for check in report.checks:
        lines.append(f"{_mark(check.state)}  {check.name.ljust(width)}  {check.finding}")
        if check.fix:
            lines.append(f"{' ' * (width + 10)}-> {check.fix}")
    lines += ["", "gives"]
    lines += [f"{'yes' if there else 'no':6}  {name}" for name, there in report.features.items()]
    verdict = "the main job can run: bash launch/pretrain_rmoe.sh"
    return "\n".join([*lines, "", verdict if report.can_run else "the main job cannot run: mend what says FAULT"])
