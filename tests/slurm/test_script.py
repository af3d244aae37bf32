"""What launch/slurm/train.sbatch asks srun for, with stand-ins for SLURM's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "slurm" / "train.sbatch"

SRUN = """#!/bin/bash
if [ "$1" = --help ]; then [ -z "$FAKE_PYXIS" ] || echo "  --container-image=IMAGE"; exit 0; fi
{ printf '%s\\n' "$@"; echo --; env | grep -E '^(NCCL|GLOO|SRUN|PYTHON=)'; echo ==; } >>"$FAKE_FOLDER/steps"
if [ -n "$FAKE_WAIT" ]; then
    trap 'echo got USR1 >>"$FAKE_FOLDER/signals"; sleep 0.3; exit $FAKE_CODE' USR1
    touch "$FAKE_FOLDER/running"
    while :; do sleep 0.05; done
fi
exit ${FAKE_CODE:-0}
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames"*) printf 'a1\\na2\\n' ;;
    "show node --oneliner a1") echo "NodeName=a1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=a1" ;;
    "show job --oneliner"*) echo "JobId=7 JobName=rmoe Command=$FAKE_TRAIN WorkDir=/x" ;;
    "show config") echo "TaskPlugin              = task/affinity,task/cgroup" ;;
    requeue*) echo "$@" >>"$FAKE_FOLDER/requeued" ;;
esac
"""


class Job:
    """The batch script in an allocation of one or two nodes, in a process of its own."""

    def __init__(self, folder: Path, nodes: int = 2, **variables: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        self.program(programs / "srun", SRUN)
        self.program(programs / "scontrol", SCONTROL)
        self.programs = programs
        (folder / "submit").mkdir()
        self.env = {"PATH": f"{programs}:/usr/bin:/bin", "PYTHON": sys.executable, "RMOE_CHECK": "0"}
        self.env |= {"FAKE_FOLDER": str(folder), "FAKE_TRAIN": str(TRAIN)}
        self.env |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "a[1-2]"}
        self.env |= {"SLURM_NTASKS_PER_NODE": "1"} | variables

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen:
        # a copy, as SLURM makes one: the script must not rely on where it lies
        copy = self.folder / "slurm_script"
        copy.write_text(TRAIN.read_text())
        command = ["bash", str(copy), *arguments]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder / "submit", stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def steps(self) -> list[tuple[list[str], dict[str, str]]]:
        """Arguments and variables of every srun."""
        path = self.folder / "steps"
        steps = []
        for step in path.read_text().split("==\n")[:-1] if path.exists() else []:
            words, _, env = step.partition("\n--\n")
            steps.append((words.split("\n"), dict(line.split("=", 1) for line in env.splitlines())))
        return steps


STARTS = "rmoe: job 12345 on a[1-2]: starts\n"
TASK = ["bash", "-c", 'exec bash "$RMOE_HOME/launch/pretrain_rmoe.sh" --node-rank "$SLURM_NODEID" "$@"', "rmoe"]


def test_two_nodes_meet_at_the_first_ones_address(tmp_path):
    job = Job(tmp_path, RMOE_INTERFACE="ib0", SLURM_CPUS_PER_TASK="12", RMOE_NPROC_PER_NODE="8")
    assert job.run("--config", "x.yaml", "--lr", "1") == (0, STARTS)
    [(words, env)] = job.steps()
    assert words == [
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--label", *TASK),
        *("--nnodes", "2", "--master-addr", "10.0.0.1", "--master-port", "22345", "--nproc-per-node", "8"),
        *("--config", "x.yaml", "--lr", "1"),
    ]
    expected = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN"}
    assert env == expected | {"SRUN_CPUS_PER_TASK": "12", "PYTHON": sys.executable}


def test_one_node_needs_no_address(tmp_path):
    job = Job(tmp_path, nodes=1)
    assert job.run("--config", "x.yaml")[0] == 0
    [(words, _)] = job.steps()
    assert words[:5] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    assert words[5:] == [*TASK, "--nnodes", "1", "--config", "x.yaml"]


def test_the_run_is_checked_once_at_the_first_start_only(tmp_path):
    job = Job(tmp_path, RMOE_CHECK="1")
    assert job.run()[0] == 0
    check, train = (words for words, _ in job.steps())
    assert check[:3] == ["--nodes=1", "--ntasks=1", "--nodelist=a1"] and check[-1] == "--dry-run"
    assert "--dry-run" not in train
    (tmp_path / "steps").unlink()
    job.env["SLURM_RESTART_COUNT"] = "1"
    assert job.run() == (0, "rmoe: job 12345 on a[1-2]: restart 1\n")
    assert len(job.steps()) == 1


def test_a_failed_check_starts_nothing(tmp_path):
    job = Job(tmp_path, RMOE_CHECK="1", FAKE_CODE="2")
    assert job.run() == (2, STARTS)
    assert len(job.steps()) == 1


def test_a_job_array_is_one_of_seeds(tmp_path):
    job = Job(tmp_path, SLURM_ARRAY_TASK_ID="3")
    assert job.run("--lr", "1")[0] == 0
    assert job.steps()[0][0][-4:] == ["--lr", "1", "--seed", "3"]
    code, err = job.run("--seed=1")
    assert code == 2 and err.startswith("rmoe: error: --seed is given, and the job array gives it its index")
    job.env["RMOE_ARRAY_OPTION"] = ""
    assert job.run("--seed=1")[0] == 0


def test_pyxis(tmp_path):
    job = Job(tmp_path, nodes=1, RMOE_CONTAINER="registry#image", FAKE_PYXIS="1", RMOE_CONTAINER_MOUNTS="/data:/data")
    job.env |= {"RMOE_CONTAINER_OPTIONS": "--no-container-mount-home --container-writable"}
    assert job.run("--lr", "1")[0] == 0
    [(words, _)] = job.steps()
    submit = tmp_path / "submit"
    assert words[5:9] == [
        "--container-image=registry#image",
        f"--container-mounts={ROOT}:{ROOT},{submit}:{submit},/data:/data",
        f"--container-workdir={submit}",
        "--no-container-mount-home",
    ]
    assert words[10:-4] == [
        *("env", "-u", "VIRTUAL_ENV", "-u", "CONDA_PREFIX", "-u", "PYTHONHOME", "PYTHON=python3"),
        *TASK,
    ]


def test_apptainer(tmp_path):
    job = Job(tmp_path, nodes=1, RMOE_CONTAINER="docker://x")
    code, err = job.run()
    assert (code, err) == (2, "rmoe: error: RMOE_CONTAINER needs pyxis or apptainer, and neither is on this node\n")
    job.program(job.programs / "apptainer", "#!/bin/sh\n")
    assert job.run()[0] == 0
    submit = tmp_path / "submit"
    expected = [*("exec", "--bind", f"{ROOT}:{ROOT},{submit}:{submit}", "--pwd", str(submit)), "docker://x", "env"]
    words = [word for word in job.steps()[0][0] if word != "--nv"]  # where there is nvidia-smi
    assert words[5:12] == [str(job.programs / "apptainer"), *expected[:5], expected[5]]


def test_modules(tmp_path):
    job = Job(tmp_path, RMOE_MODULES="python/3.12 nothing")
    job.env["BASH_FUNC_module%%"] = '() { case $2 in nothing) echo "ERROR: Unable to locate $2" ;; esac; }'
    assert job.run() == (2, "rmoe: error: RMOE_MODULES: module load nothing: ERROR: Unable to locate nothing\n")
    job.env["RMOE_MODULES"] = "python/3.12"
    assert job.run() == (0, STARTS)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RMOE_HOME": "/nowhere"}, "/nowhere is not the repository: set RMOE_HOME"),
        ({"RMOE_VENV": "/nowhere"}, "RMOE_VENV: there is no /nowhere/bin/python"),
        ({"PYTHON": "/bin/false"}, "/bin/false on this node has no torch and megatron-core: set RMOE_VENV, RMOE_MOD"),
        ({"RMOE_CONTAINER": "/nowhere.sif"}, "RMOE_CONTAINER: cannot read /nowhere.sif"),
        ({"RMOE_CONTAINER": "x", "RMOE_CONTAINER_RUNTIME": "docker"}, "RMOE_CONTAINER_RUNTIME must be pyxis or apptai"),
        ({"RMOE_CONTAINER": "x", "RMOE_CONTAINER_RUNTIME": "pyxis"}, "RMOE_CONTAINER_RUNTIME: srun has no pyxis here"),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "16"}, "16 tasks for 2 node(s): ask sbatch for nodes (--node"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, variables, message):
    code, err = Job(tmp_path, **variables).run()
    assert code == 2 and err.startswith("rmoe: error: " + message) and err.count("\n") == 1


def signalled(job: Job, number: signal.Signals) -> tuple[int, str]:
    process = job.start()
    deadline = time.monotonic() + 60
    while not (job.folder / "running").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(
    ("number", "code", "variables", "requeued"),
    [
        (signal.SIGUSR1, 0, {}, True),
        (signal.SIGUSR1, 138, {"SLURM_RESTART_COUNT": "1"}, True),
        (signal.SIGUSR1, 138, {}, False),  # nothing saved in the first seconds of the first session
        (signal.SIGUSR1, 2, {}, False),
        (signal.SIGUSR1, 0, {"RMOE_MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": "3"}, False),
        (signal.SIGTERM, 0, {}, False),
    ],
)
def test_signals_reach_the_step_once_and_the_limits_requeues(tmp_path, number, code, variables, requeued):
    job = Job(tmp_path, FAKE_WAIT="1", FAKE_CODE=str(code), **variables)
    exit_code, err = signalled(job, number)
    assert (tmp_path / "signals").read_text() == "got USR1\n"
    assert (tmp_path / "requeued").exists() == requeued
    assert ("rmoe: job 12345: requeued" in err) == requeued
    assert exit_code == (0 if requeued or code == 0 else 2)


def test_help_and_the_wrong_way_to_start():
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(TRAIN), "--help"], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 0 and done.stdout.startswith("Pre-training as a SLURM job") and "SBATCH" not in done.stderr
    )
    assert "RMOE_CONTAINER_RUNTIME" in done.stdout and "set -euo" not in done.stdout
    done = subprocess.run(["bash", str(TRAIN)], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("rmoe: error: this is a SLURM job: submit it with sbatch")
