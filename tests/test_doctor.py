"""What the doctor says of this machine, and of machines that lack something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.doctor import Check, Report, checks, probes, report
from rmoe_megablocks.doctor.probes import Torch


@pytest.fixture
def only(monkeypatch):
    """Makes the machine have only the given modules and distributions."""

    def install(modules=(), versions=None):
        monkeypatch.setattr(probes, "there", lambda module: module in modules)
        monkeypatch.setattr(probes, "version", (versions or {}).get)
        monkeypatch.setattr(probes, "import_trouble", lambda module: "")

    return install


def test_this_machine_can_run_the_main_job(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    states = {check["name"]: check["state"] for check in said["checks"]}
    assert said["can_run"]
    for name in ("Python", "torch", "Megatron-Core", "libraries", "machine", "disk"):
        assert states[name] == "ok", name
    assert any(name.endswith(" loopback") and state == "ok" for name, state in states.items())
    assert said["features"]["main job on CPU (gloo)"] or said["features"]["main job on GPUs (NCCL)"]


def test_a_screen_names_each_fix_and_the_verdict():
    found = [Check("Python", "ok", "3.12"), Check("MegaBlocks", "absent", "not installed", "rmoe install megablocks")]
    screen = report.text(Report(found, report.features(found, gpu=False)))
    assert "-> rmoe install megablocks" in screen and "the main job can run" in screen
    broken = [*found, Check("torch", "fault", "not installed", checks.SET_UP)]
    faulty = Report(broken, report.features(broken, gpu=False))
    assert not faulty.can_run and "cannot run" in report.text(faulty) and not any(faulty.features.values())


def test_exit_code_when_the_main_job_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(report, "examine", lambda loopback: Report([Check("torch", "fault", "not installed")], {}))
    assert cli.main(["doctor"]) == 1
    assert "FAULT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("check", "state", "words"),
    [
        (lambda: checks.check_python((3, 11, 2)), "fault", "3.11.2, but 3.12"),
        (lambda: checks.check_torch(Torch()), "fault", "not installed"),
        (lambda: checks.check_megatron(), "fault", "not installed"),
        (lambda: checks.check_libraries()[0], "fault", "psutil"),
        (lambda: checks.check_transformer_engine(True), "absent", "transformer-engine[pytorch]"),
        (lambda: checks.check_apex(True), "absent", "NVIDIA/apex"),
        (lambda: checks.check_megablocks()[0], "absent", "rmoe install megablocks"),
    ],
)
def test_an_empty_machine(only, check, state, words):
    only()
    found = check()
    assert found.state == state and words in f"{found.finding} {found.fix}"
    assert found.fix


def test_versions_that_are_not_supported(only):
    only(versions={"torch": "2.8.0", "megatron-core": "0.16.0"})
    assert "2.8.0, but 2.9 to 2.15" in checks.check_torch(Torch()).finding
    assert "0.16.0, but 0.19 to 0.20" in checks.check_megatron().finding
    only(versions={"torch": "2.11.0", "megatron-core": "0.19.2"})
    assert checks.check_torch(Torch(trouble="ImportError: libcudart")).state == "fault"
    assert checks.check_megatron().finding == "0.19.2 without megatron.training"


def test_nothing_that_is_there_is_called_absent(only):
    """A version beside the word absent makes one look for what is wrong with either."""
    names = ("apex", "apex.optimizers", "transformer_engine", "megablocks_ops", "grouped_gemm")
    only(modules=names, versions={name: "3.6.0" for name in ("triton", "megablocks", "transformer-engine")})
    found = [checks.check_triton(False), checks.check_cuda(Torch(cuda="13.0")), checks.check_transformer_engine(False)]
    found += [checks.check_apex(False), *checks.check_megablocks()]
    assert [check.state for check in found] == ["unused", "unused", "ok", "unused", "ok", "ok", "ok"]
    screen = report.text(Report(found, {}))
    assert "unused  Triton" in screen and "absent" not in screen


def test_versions_that_are_newer_or_a_containers(only, monkeypatch):
    only(modules=["megatron.training"], versions={"torch": "2.11.0a0+abc.nv25.10", "megatron-core": "0.21.0"})
    assert checks.check_torch(Torch()) == Check("torch", "ok", "2.11.0a0+abc.nv25.10")
    assert checks.check_megatron() == Check("Megatron-Core", "ok", "0.21.0 (never tried: 0.19 to 0.20 were)")
    monkeypatch.setattr(checks.self_check, "missing_names", lambda folder: ["megatron.core:a (x)", "megatron.core:b"])
    assert checks.check_megatron().finding == "0.21.0 lacks megatron.core:a (x) and 1 more"
    only(versions={"torch": "2.16.0"})
    assert checks.check_torch(Torch()).finding == "2.16.0 (never tried: 2.9 to 2.15 were)"
    assert checks.check_python((3, 13, 1)).state == "ok"


def test_the_two_kinds_of_apex(only):
    only(modules=["apex"])
    assert checks.check_apex(True) == Check(
        "Apex", "unused", "another project of that name, not NVIDIA's", "pip uninstall apex"
    )
    only(modules=["apex", "apex.optimizers"])
    assert "without its compiled parts" in checks.check_apex(True).finding
    only(modules=["apex", "apex.optimizers", "amp_C"])
    assert checks.check_apex(True).state == "ok"


def test_a_package_that_is_there_but_broken(only, monkeypatch):
    only(modules=["transformer_engine"], versions={"transformer-engine": "2.9"})
    monkeypatch.setattr(probes, "import_trouble", lambda module: "ImportError: undefined symbol")
    found = checks.check_transformer_engine(True)
    assert (found.state, found.finding) == ("broken", "ImportError: undefined symbol") and found.fix


def test_a_toolkit_is_no_gpu(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/opt/cuda/bin/nvcc")
    found = checks.check_cuda(Torch(cuda="13.0"))
    assert found.state == "unused" and "/opt/cuda/bin/nvcc (not used: no GPU)" in found.finding
    assert checks.check_cuda(Torch(cuda="13.0", gpus=["A100"])).state == "ok"
    monkeypatch.setattr(probes, "nvidia_devices", lambda: False)
    assert checks.check_gpus([]).fix == ""
    monkeypatch.setattr(probes, "nvidia_devices", lambda: True)
    assert "driver" in checks.check_gpus([]).fix
    assert checks.check_gpus(["A100", "A100"]).finding == "2 x A100"


def test_a_full_disk_and_a_small_shared_memory(monkeypatch, tmp_path):
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage._replace(free=2**28))
    assert checks.check_disk(tmp_path).state == "fault"
    assert "--shm-size" in checks.check_shared_memory(tmp_path).fix


def test_a_loopback_that_fails(monkeypatch):
    monkeypatch.setattr(probes, "_LOOPBACK", "raise SystemExit('no such interface')")
    found = checks.check_loopback("gloo", 2)
    assert (found.state, found.finding) == ("fault", "no such interface") and "GLOO_SOCKET_IFNAME" in found.fix
    monkeypatch.setattr(probes, "_LOOPBACK", "import time; time.sleep(60)")
    monkeypatch.setattr(probes, "_LOOPBACK_SECONDS", 0.2)
    assert "no answer" in checks.check_loopback("gloo", 2).finding


def test_it_needs_neither_torch_nor_megatron_to_start():
    program = "import sys, rmoe_megablocks.cli; print([m for m in ('torch', 'megatron.core') if m in sys.modules])"
    root = Path(checks.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
