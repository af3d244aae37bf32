"""One run a folder: who is refused, whose lock is stale, on this machine and on another."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from rmoe_megablocks import run_lock

HOLD = """
import sys, time
from pathlib import Path
from rmoe_megablocks import run_lock
lock = run_lock.acquire(Path(sys.argv[1]), "--run-name")
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def put(folder, **changes):
    """A lock of somebody who differs from this process in ``changes``."""
    holder = replace(run_lock._myself(), **changes)
    (folder / run_lock.NAME).write_text(json.dumps(asdict(holder)))
    return holder


def no_wait(text):
    pytest.fail(f"waits: {text}")


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path, other):
    before = sorted(tmp_path.iterdir())
    for attempt in (run_lock.check, run_lock.acquire):
        with pytest.raises(run_lock.Held, match=rf"in use by another run \(process {other.pid} on .*--run-name"):
            attempt(tmp_path, "--run-name", no_wait)
    assert sorted(tmp_path.iterdir()) == before


def test_kill_9_leaves_no_stale_lock(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / run_lock.NAME).exists()
    run_lock.check(tmp_path, "--run-name", no_wait)
    lock = run_lock.acquire(tmp_path, "--run-name", no_wait)
    assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_is_used_again_is_not_the_holder(tmp_path):
    put(tmp_path, pid=os.getppid(), started=1.0)
    run_lock.acquire(tmp_path, "--run-name", no_wait).release()


def test_the_end_of_the_process_releases(tmp_path):
    code = HOLD.replace("time.sleep(60)", "sys.exit(3)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL).returncode == 3
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_release(tmp_path):
    lock = run_lock.acquire(tmp_path, "--run-name", no_wait)
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert (tmp_path / run_lock.NAME).exists()
    lock.release()


ELSEWHERE = {"host": "node7", "machine": "another-boot pid:[1]"}


def test_a_slurm_job_takes_over_from_its_own_earlier_start_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    put(tmp_path, **ELSEWHERE, job="42", restart=0)
    run_lock.acquire(tmp_path, "--run-name", no_wait).release()
    for other in ({"job": "42", "restart": 1}, {"job": "41", "restart": 0}, {"job": None, "restart": None}):
        put(tmp_path, **ELSEWHERE, **other)
        with pytest.raises(RuntimeError, match="waits"):
            run_lock.acquire(tmp_path, "--run-name", waits)


def waits(text):
    raise RuntimeError("waits: " + text)


def test_another_machine_is_watched_for_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DEAD_AFTER", 1.0)
    said = []
    holder = put(tmp_path, **ELSEWHERE)
    beating = subprocess.Popen(["bash", "-c", f"while sleep 0.2; do touch {tmp_path / run_lock.NAME}; done"])
    try:
        with pytest.raises(run_lock.Held, match="on node7"):
            run_lock.check(tmp_path, "--run-name", said.append)
    finally:
        beating.kill()
        beating.wait()
    assert len(said) == 1 and str(holder) in said[0] and "waiting 1 s" in said[0]
    run_lock.acquire(tmp_path, "--run-name", said.append).release()
    assert len(said) == 2


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    lock = run_lock.acquire(tmp_path, "--run-name", no_wait)
    os.utime(tmp_path / run_lock.NAME, (1, 1))
    deadline = time.monotonic() + 5
    while (tmp_path / run_lock.NAME).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / run_lock.NAME).stat().st_mtime > 2
    lock.release()


def test_a_run_whose_lock_was_taken_ends(tmp_path):
    code = HOLD.replace("lock = run", "run_lock.BEAT_SECONDS = 0.1\nlock = run")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holds\n"
    put(tmp_path, **ELSEWHERE)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith("rmoe: error: the lock of") and "on node7" in err and len(err.splitlines()) == 1
    assert json.loads((tmp_path / run_lock.NAME).read_text())["host"] == "node7"


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    put(tmp_path, pid=2**22 + 5)
    code = HOLD.replace("time.sleep(60)", "time.sleep(3)")
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    answers = [run.communicate(timeout=60) for run in runs]
    assert sorted(out for out, _ in answers) == [b""] * 5 + [b"holds\n"]
    assert all(b"Held" in err for out, err in answers if not out)


def test_something_else_of_that_name(tmp_path):
    (tmp_path / run_lock.NAME).write_text("hello")
    with pytest.raises(run_lock.Held, match="not a lock of ours"):
        run_lock.acquire(tmp_path, "--run-name", no_wait)
