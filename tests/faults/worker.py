"""The launcher's worker with a planted fault: ``agent ... -m tests.faults.worker ARGUMENTS``.

RMOE_TEST_PLANT is "RANK:NAME": one of full.PLANTS, or "traceback" for an error in the fourth iteration.
"""

import os
import sys

from rmoe_megablocks.launcher import worker
from tests.faults import full


def _fail_in_a_step() -> None:
    import rmoe_megablocks.megatron  # noqa: F401  CPU mode before Megatron

    from megatron.training import training  # isort: skip

    original, steps = training.train_step, [0]

    def train_step(*args, **kwargs):
        steps[0] += 1
        if steps[0] == 4:
            raise RuntimeError("planted")
        return original(*args, **kwargs)

    training.train_step = train_step


if __name__ == "__main__":
    rank, _, name = os.environ.get("RMOE_TEST_PLANT", "").partition(":")
    if rank == os.environ["RANK"]:
        (full.PLANTS | {"traceback": _fail_in_a_step})[name]()
    sys.exit(worker.main(sys.argv[1:]))
