"""The training entry with a planted fault: ``torchrun -m tests.faults.entry FAULT ARGUMENTS``, "none" for none."""

import sys

from rmoe_megablocks.megatron import pretrain  # isort: skip  before Megatron: CPU mode
from tests.distributed import breakages


def main(fault: str, *argv: str) -> None:
    """Trains, and ends the process."""
    with breakages.applied(None if fault == "none" else fault):
        sys.exit(pretrain.main(list(argv)))


if __name__ == "__main__":
    main(*sys.argv[1:])
