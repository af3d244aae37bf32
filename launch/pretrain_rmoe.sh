#!/usr/bin/env bash
""":"
# Pre-training, in one file that is valid Bash and valid Python:
#
#   bash launch/pretrain_rmoe.sh [--config FILE] [any Megatron argument ...]
#   torchrun --nproc-per-node 2 launch/pretrain_rmoe.sh [--config FILE] [any Megatron argument ...]
#
# Bash runs the lines up to exec: it sets the environment up and starts the launcher, which checks the run and starts
# torchrun. torchrun hands this file to Python, for which these lines are the docstring and the code follows below.
# Python must not find a backslash or three quotes in this part.

set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$RMOE_PYTHON" -m rmoe_megablocks.launcher "$@"

# shellcheck disable=SC2317  # never reached, by design: the rest is for Python
: <<'# end of the Python part'
"""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    if importlib.util.find_spec("rmoe_megablocks") is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from rmoe_megablocks.launcher import worker

    sys.exit(worker.main(sys.argv[1:]))
# end of the Python part
