#!/usr/bin/env bash
# What a machine with a GPU is for, in one call of less than ten minutes on an H100:
#
#   bash tests/gpu.sh [FOLDER for the tables]    (default benchmarks/results)
#
# the tests that need a GPU, the tables of routing_step and router_overhead, and compute-sanitizer on the kernels. Each
# part has a time limit and goes on whatever became of the one before; the end says what became of each, and the exit
# status is 0 if all have passed.
#
# Variables: RMOE_WHEELS   a folder of wheels: nothing is taken from a network. Where the active Python ($PYTHON) has
#                          torch, they go into .versions/gpu beside it, and torch need not be among them. It holds
#                          what this brings, in the versions of that Python and torch's CUDA (less torch and what it
#                          needs): pip download -d DIR . "setuptools>=71" pytest pytest-xdist nvidia-cuda-sanitizer-api
#            RMOE_GPU_PAIRS  pairs of steps of router_overhead (default 200)
#            and those of launch/environment.sh
#
# compute-sanitizer is looked for on PATH, in /usr/local/cuda/bin and in that wheel; without it its parts are left out.
set -euo pipefail
shopt -s inherit_errexit
case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{/^# \{0,1\}/s///p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
folder=$(realpath -m -- "${1:-$(dirname -- "${BASH_SOURCE[0]}")/../benchmarks/results}")
[ -z "${RMOE_WHEELS:-}" ] || RMOE_WHEELS=$(realpath -m -- "$RMOE_WHEELS")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Prints a Python that has the active one's torch and the wheels.
beside_torch() {
    local base=$1 own=.versions/gpu
    "$base" -m venv --system-site-packages "$own"
    "$own/bin/python" -m pip install --quiet --disable-pip-version-check "setuptools>=71" pytest pytest-xdist >&2
    "$own/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e . >&2
    "$own/bin/python" -m pip install --quiet --disable-pip-version-check nvidia-cuda-sanitizer-api >&2 ||
        echo "rmoe: no wheel of nvidia-cuda-sanitizer-api in $PIP_FIND_LINKS" >&2
    printf '%s\n' "$PWD/$own/bin/python"
}

if [ -n "${RMOE_WHEELS:-}" ]; then
    [ -d "$RMOE_WHEELS" ] || {
        echo "rmoe: error: RMOE_WHEELS: there is no folder $RMOE_WHEELS" >&2
        exit 2
    }
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$RMOE_WHEELS
    python=$(command -v -- "${PYTHON:-python3}")
    if (cd / && "$python" -c 'import torch') 2>/dev/null; then
        PYTHON=$(beside_torch "$python")
        export PYTHON
    fi
fi
export RMOE_NEEDS="pytest pytest-xdist"
# shellcheck source=launch/environment.sh
. launch/environment.sh

name=$("$RMOE_PYTHON" -c '
import sys, torch
if not torch.cuda.is_available(): sys.exit(1)
print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
    echo "rmoe: error: no CUDA GPU is visible" >&2
    exit 2
}
mkdir -p -- "$folder"

find_sanitizer() {
    command -v compute-sanitizer && return
    if [ -x /usr/local/cuda/bin/compute-sanitizer ]; then
        echo /usr/local/cuda/bin/compute-sanitizer
        return
    fi
    # pip's wheel: nvidia/cu13/bin beside nvidia/cu13/lib
    "$RMOE_PYTHON" -c '
import importlib.metadata as metadata, os
for file in metadata.files("nvidia-cuda-sanitizer-api") or ():
    if file.name == "compute-sanitizer":
        os.chmod(file.locate(), 0o755)
        print(file.locate())' 2>/dev/null
}

failed=0
summary=()
running=
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 status=0 start=$SECONDS word
    shift 2
    printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*"
    timeout --kill-after=5 "$limit" "$@" & # its own group of processes, which Ctrl-C does not reach
    running=$!
    wait "$running" || status=$?
    running=
    case $status in
        0) word=passed ;;
        124 | 137) word="OUT OF TIME, more than $limit s" ;;
        *) word="FAILED with status $status" ;;
    esac
    [ "$status" = 0 ] || failed=1
    summary+=("$(printf '%-16s %4d s  %s' "$name" "$((SECONDS - start))" "$word")")
}

# The files alone: collecting the whole suite takes as long as running these. -m gpu leaves out their other tests.
mapfile -t files < <(grep -rlE "mark\.gpu\b" tests --include="test_*.py" | sort)
workers=$(nproc)
[ "$workers" -le 6 ] || workers=6
# Together 550 seconds. Most of the tests' time is compiling kernels, which the sanitizer then finds in Triton's cache.
part "gpu tests" 140 "$RMOE_PYTHON" -m pytest -m gpu "${files[@]}" --numprocesses "$workers" --dist worksteal
part routing_step 120 "$RMOE_PYTHON" -m benchmarks routing_step --against released GRUCell compiled upcast \
    --keep-going --output "$folder/routing_step_$name.md" --csv "$folder/routing_step_$name.csv"
part router_overhead 160 "$RMOE_PYTHON" -m benchmarks router_overhead --pairs "${RMOE_GPU_PAIRS:-200}" \
    --output "$folder/router_overhead_$name.md"

sanitizer=$(find_sanitizer) || true
if [ -n "$sanitizer" ]; then
    options=(--error-exitcode 9 --report-api-errors no --kernel-name kns=forward --kernel-name kns=backward)
    libraries=$(dirname -- "$sanitizer")/../lib
    [ ! -e "$libraries/libTreeLauncherTargetInjection.so" ] || options+=(--injection-path "$(realpath "$libraries")")
    # small sizes of each kernel: fused, fused without logits, pointwise, one token, none
    chosen="test_equals_the_equations and (65-24-5 or 1000-96-200 or 513-256-16 or 1-16-2 or 0-64-8)"
    for tool in memcheck racecheck; do
        # without torch's cache every tensor is an allocation of its own, whose ends memcheck knows
        part "$tool" 65 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" "${options[@]}" \
            "$RMOE_PYTHON" -m pytest -x tests/kernels/test_triton_gpu.py -k "$chosen"
    done
else
    summary+=("memcheck, racecheck: not run, no compute-sanitizer was found")
fi

printf '\n== %s: %d s\n' "$name" "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
