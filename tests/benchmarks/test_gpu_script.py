"""tests/gpu.sh without a GPU: the Python, the sanitizer and the clock of its time limits are shell scripts here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
case "$1" in
    -) echo "ok $0" ;;
    -c) case "$2" in
        *get_device_name*) [ -z "$NO_GPU" ] && echo nvidia-test ;;
        *) exit 1 ;;
    esac ;;
    -m) echo "python $*" >>"$CALLS"; [[ -z "$FAILS" || "$*" != *"$FAILS"* ]] ;;
esac
"""
SANITIZER = """#!/bin/bash
echo "sanitizer $2 cached=$PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"
while [ "$1" != "$PYTHON" ]; do shift; done
"$@" || exit 9
"""
TIMEOUT = """#!/bin/bash
shift
echo "limit $1" >>"$CALLS"
shift
[[ -z "$SLOW" || "$*" != *"$SLOW"* ]] || exit 124
exec "$@"
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs the script; (exit status, its last lines, what it called)."""
    scripts = {"python": PYTHON, "compute-sanitizer": SANITIZER, "timeout": TIMEOUT}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**variables: str) -> tuple[int, list[str], str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:{os.defpath}", "PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
        command = ["bash", str(ROOT / "tests" / "gpu.sh"), str(tmp_path / "tables")]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60)
        lines = done.stdout.split("\n== nvidia-test: ")[-1].splitlines()[1:] if done.stdout else [done.stderr]
        return done.returncode, lines, calls.read_text() if calls.exists() else ""

    return run


def states(lines: list[str]) -> dict[str, str]:
    return {line[:16].strip(): line.split(" s  ")[1] for line in lines}


def test_all_parts(gpu, tmp_path):
    code, lines, calls = gpu()
    parts = ["gpu tests", "routing_step", "router_overhead", "memcheck", "racecheck"]
    assert code == 0 and states(lines) == dict.fromkeys(parts, "passed")
    assert sum(int(line.split()[1]) for line in calls.splitlines() if line.startswith("limit")) <= 550
    assert "-m gpu tests/kernels/test_triton_gpu.py tests/routing/test_recurrence_gpu.py --numprocesses" in calls
    assert f"--output {tmp_path}/tables/routing_step_nvidia-test.md" in calls and "--pairs 200" in calls
    for tool in ("memcheck", "racecheck"):
        assert f"sanitizer {tool} cached=1" in calls


@pytest.mark.parametrize("part", ["gpu tests", "router_overhead", "memcheck"])
def test_a_part_that_fails_does_not_hide_the_others(gpu, part):
    fails = {"gpu tests": "-m gpu", "router_overhead": "router_overhead", "memcheck": "-k test_equals"}[part]
    code, lines, _ = gpu(FAILS=fails)
    found = states(lines)
    failed = {name for name, state in found.items() if state != "passed"}
    assert code == 1 and len(found) == 5
    assert failed == ({"memcheck", "racecheck"} if part == "memcheck" else {part})
    assert found[part] == f"FAILED with status {9 if part == 'memcheck' else 1}"


def test_a_part_that_takes_too_long(gpu):
    code, lines, _ = gpu(SLOW="routing_step")
    assert code == 1 and states(lines)["routing_step"] == "OUT OF TIME, more than 120 s"
    assert states(lines)["router_overhead"] == "passed"


def test_without_a_sanitizer(gpu, tmp_path):
    (tmp_path / "compute-sanitizer").unlink()
    code, lines, calls = gpu()
    if "racecheck" in calls:
        pytest.skip("a GPU is visible: that the script refuses a machine without one cannot be seen")
    assert code == 0 and lines[-1] == "memcheck, racecheck: not run, no compute-sanitizer was found"


def test_a_folder_of_wheels_that_is_not_there(gpu):
    code, lines, calls = gpu(RMOE_WHEELS="nowhere")
    assert (code, lines, calls) == (2, [f"rmoe: error: RMOE_WHEELS: there is no folder {os.getcwd()}/nowhere\n"], "")


def test_without_a_gpu(gpu):
    code, lines, calls = gpu(NO_GPU="1")
    assert code == 2 and lines == ["rmoe: error: no CUDA GPU is visible\n"] and calls == ""
