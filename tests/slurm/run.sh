#!/usr/bin/env bash
# The tests of launch/slurm with a real SLURM of two nodes on this machine, a few minutes:
#
#   bash tests/slurm/run.sh [pytest's arguments]
#
# As root on Debian or Ubuntu; SLURM is installed with apt-get if missing (slurm-wlm, munge). Where that cannot be, the
# tests are skipped with the reason. All daemons stop at the end, also after Ctrl-C or a crash: tests/slurm/cluster.sh.
set -euo pipefail
case ${1:-} in
    -h | --help)
        sed -n '2,/^set/{/^set/q; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
export RMOE_TEST_SLURM=1
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../run.sh" tests/slurm -rs "$@"
