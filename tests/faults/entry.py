"""The training entry with a planted fault: ``torchrun -m tests.faults.entry FAULT ARGUMENTS``, "none" for none."""

import sys

from rmoe_megablocks.megatron import pretrain  # isort: skip  before Megatron: CPU mode
from tests.distributed import breakages

if __name__ == "__main__":
    fault, *argv = sys.argv[1:]
    with breakages.applied(None if fault == "none" else fault):
        sys.exit(pretrain.main(argv))
