#!/usr/bin/env bash
# What a machine with a GPU is for: the tests marked gpu, then every benchmark. bash tests/gpu.sh [FOLDER for the tables]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

folder=${1:-benchmarks/results}
mkdir -p -- "$folder"
name=$("$RMOE_PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || {
    echo "rmoe: error: no CUDA GPU is visible" >&2
    exit 2
}
"$RMOE_PYTHON" -m pytest -m gpu
"$RMOE_PYTHON" -m benchmarks moe_layer --output "$folder/moe_layer_$name.md"
"$RMOE_PYTHON" -m benchmarks router_overhead --output "$folder/router_overhead_$name.md"
