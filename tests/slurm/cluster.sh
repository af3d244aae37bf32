#!/usr/bin/env bash
# A real SLURM on this machine: one controller, two nodes n1 and n2, in a folder of its own under /tmp.
#
#   bash tests/slurm/cluster.sh [--install]    prints "ready FOLDER" (then SLURM_CONF=FOLDER/slurm.conf), runs until its
#                                              standard input ends, then stops everything and removes the folder
#   bash tests/slurm/cluster.sh --help
#
# --install gets Debian's slurm-wlm and munge with apt-get where they are missing. Where it cannot work it prints
# "skip REASON" and exits with 77. Needs root, because slurmd does. Debian's build of slurmd can run several times on
# one host, which is what makes two nodes possible.
set -euo pipefail

skip() {
    printf 'skip %s\n' "$*"
    exit 77
}

install_it=''
case ${1:-} in
    '') ;;
    --install) install_it=1 ;;
    *)
        sed -n '/^# A real/,/^set/{/^set/q; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac

[ "$(uname -s)" = Linux ] || skip "SLURM needs Linux"
[ "$(id -u)" = 0 ] || skip "slurmd needs root"
have_all() { [ "$(command -v slurmctld slurmd munged sbatch srun | wc -l)" -eq 5 ]; }
if ! have_all; then
    [ -n "$install_it" ] || skip "SLURM is not installed (apt-get install slurm-wlm munge)"
    command -v apt-get >/dev/null || skip "SLURM is not installed, and there is no apt-get"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 300 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
        >&2 || skip "apt-get could not install slurm-wlm and munge (offline?)"
    have_all || skip "slurm-wlm and munge are installed but incomplete"
fi

folder=$(mktemp -d /tmp/rmoe-slurm.XXXXXX)
pids=()
# shellcheck disable=SC2329  # the trap's
stop() {
    local pid status=$?
    trap - EXIT
    # jobs first: their processes are children of slurmstepd, not of the daemons
    SLURM_CONF=$folder/slurm.conf timeout 20 scancel --full --signal=KILL --user=root >/dev/null 2>&1 || true
    SLURM_CONF=$folder/slurm.conf timeout 20 scancel --user=root >/dev/null 2>&1 || true
    for _ in $(seq 20); do
        [ -n "$(SLURM_CONF=$folder/slurm.conf timeout 5 squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf -- "$folder"
    exit "$status"
}
trap stop EXIT
trap 'exit 143' TERM INT HUP

chmod 755 "$folder"
mkdir -p "$folder/munge" "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge/key"
chmod 600 "$folder/munge/key"
chown -R munge "$folder/munge"
chmod 755 "$folder/munge"

# The port numbers depend on the process: several such clusters may run at once.
port=$((16000 + $$ % 3000 * 4))
cat >"$folder/slurm.conf" <<CONF
ClusterName=rmoe
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its last credential has expired: two minutes if nothing is said
AuthInfo=socket=$folder/munge/socket,cred_expire=15
SlurmctldPort=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool/%n
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
JobRequeue=1
KillWait=10
ReturnToService=2
MpiDefault=none
NodeName=n[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=1
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
CONF
export SLURM_CONF=$folder/slurm.conf

runuser -u munge -- munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" >"$folder/munge.log" 2>&1 &
pids=("$!" "${pids[@]}")
for _ in $(seq 50); do
    [ ! -S "$folder/munge/socket" ] || break
    sleep 0.1
done
slurmctld -D >"$folder/slurmctld.out" 2>&1 &
pids=("$!" "${pids[@]}")
for node in n1 n2; do
    mkdir "$folder/spool/$node"
    slurmd -D -N "$node" >"$folder/slurmd-$node.out" 2>&1 &
    pids=("$!" "${pids[@]}")
done
for _ in $(seq 60); do
    ready=$(sinfo --noheader --Node --format=%t 2>/dev/null | grep -c '^idle') || ready=0
    if [ "$ready" -eq 2 ]; then
        printf 'ready %s\n' "$folder"
        cat >/dev/null
        exit 0
    fi
    sleep 0.5
done
tail -n 5 "$folder"/*.log "$folder"/*.out >&2
printf 'failed: the nodes did not become idle within 30 seconds\n' >&2
exit 1
