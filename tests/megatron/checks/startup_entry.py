"""The worker with an assertion planted in Megatron, on one rank: ``-m`` this module ``RANK ARGUMENTS``."""

import os
import sys

import rmoe_megablocks.megatron  # noqa: F401  CPU mode before Megatron
from rmoe_megablocks.launcher import worker

from megatron.training import training  # isort: skip  after CPU mode


def fail(*args: object, **kwargs: object) -> None:
    """Stands in for a check of Megatron's that one rank alone does not pass."""
    raise AssertionError("planted: the rank's own data are missing")


if __name__ == "__main__":
    rank, *argv = sys.argv[1:]
    if os.environ["RANK"] == rank:
        training.build_train_valid_test_data_iterators = fail
    sys.exit(worker.main(argv))
