"""Which torch and Megatron-Core are taken, and what is said about the others."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe_megablocks.compat import self_check, upstreams, versions
from rmoe_megablocks.compat.touched_names import TOUCHED, Touched
from rmoe_megablocks.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
MEGATRON = versions.megatron_folder()


@pytest.mark.parametrize(
    ("version", "older", "newer"),
    [
        ("2.8.9", True, False),
        ("2.9.0a0+abc.nv25.9", False, False),
        ("2.11.0a0+abc.nv25.10", False, False),
        ("2.15.1+cu130", False, False),
        ("2.16.0", False, True),
        ("3.0", False, True),
        ("main", True, False),
        (None, True, False),
    ],
)
def test_a_version_is_older_newer_or_fits(version, older, newer):
    bounds = ((2, 9), (2, 15))
    assert (versions.is_older(version, bounds), versions.is_newer(version, bounds)) == (older, newer)


def test_versions_are_read_from_the_packages_own_files():
    import torch
    from megatron.core import package_info

    assert versions.torch_version() == torch.__version__
    assert versions.megatron_version(MEGATRON) == ".".join(package_info.__version__.partition("+")[0].split("."))


def test_installing_replaces_no_torch_and_no_megatron():
    """By pip's rule for what is installed already: pre-releases count."""
    from packaging.requirements import Requirement

    namespace: dict = {}
    block = (ROOT / "setup.py").read_text().partition("# >>> requirements")[2].partition("# <<< requirements")[0]
    exec(block, namespace)
    specifiers = {(r := Requirement(text)).name: r.specifier for text in namespace["INSTALL_REQUIRES"]}
    for name, found in (
        ("torch", ("2.9.0a0+abc.nv25.9", "2.9.0", "2.11.0a0+abc.nv25.10", "2.15.0", "2.16.0.dev20261101", "3.0")),
        ("megatron-core", ("0.19.0rc0", "0.19.0", "0.19.2", "0.20.0rc1", "0.20.0+d98e8a6", "1.0")),
    ):
        for version in found:
            assert specifiers[name].contains(version, prereleases=True), (name, version)
    assert not specifiers["torch"].contains("2.8.0") and not specifiers["megatron-core"].contains("0.18.2")
    assert namespace["PYTHON_REQUIRES"] == ">=3.12"  # no upper bound


def test_this_megatron_has_every_name():
    assert self_check.missing_names(MEGATRON) == []


def test_a_missing_name_is_told_with_its_reason():
    schedules = "megatron.core.pipeline_parallel.schedules"
    touched = [
        Touched(f"{schedules}:NoSuchCommunicator", "do this"),
        Touched("megatron.core.no_such_module:name", "do that"),
        Touched("megatron.core.transformer.moe.router:TopKRouter.no_such_method", "route"),
        Touched("megatron.training.training:training_log", "log", ("iteration", "no_such_parameter")),
        Touched("megatron.core:parallel_state", "find a module of a package"),
    ]
    assert self_check.missing_names(MEGATRON, touched) == [
        f"{schedules}:NoSuchCommunicator (needed to do this)",
        "megatron.core.no_such_module:name (needed to do that)",
        "megatron.core.transformer.moe.router:TopKRouter.no_such_method (needed to route)",
        "megatron.training.training:training_log(no_such_parameter=) (needed to log)",
    ]


def test_every_name_that_compat_replaces_is_in_the_list():
    """Assignments to a name of a module that was imported from Megatron."""
    listed = {entry.name for entry in TOUCHED}
    found = set()
    for file in sorted((ROOT / "rmoe_megablocks").rglob("*.py")):
        tree = ast.parse(file.read_text())
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                modules |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("megatron.")}
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    module = modules.get(target.value.id)
                    found |= {f"{module}:{target.attr}"} if module and target.value.id.islower() else set()
    assert len(found) > 10 and found <= listed, sorted(found - listed)


class Checkout:
    """A Megatron-LM of another version, made of links to the installed one, with a script beside it."""

    def __init__(self, folder: Path, version: str, lacks: str = ""):
        self.script = folder / "script.py"
        core, self.folder = folder / "megatron" / "core", folder
        core.mkdir(parents=True)
        (folder / "megatron" / "training").symlink_to(MEGATRON / "training")
        for entry in (MEGATRON / "core").iterdir():
            if entry.name not in ("package_info.py", "pipeline_parallel"):
                (core / entry.name).symlink_to(entry)
        major, minor, patch = version.split(".")
        info = (MEGATRON / "core" / "package_info.py").read_text()
        numbers = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"
        rest = info[info.index("# Use the following formatting") :]
        (core / "package_info.py").write_text(numbers + rest)
        (core / "pipeline_parallel").mkdir()
        for entry in (MEGATRON / "core" / "pipeline_parallel").glob("*.py"):
            text = entry.read_text()
            (core / "pipeline_parallel" / entry.name).write_text(text.replace(lacks, "Renamed") if lacks else text)
        self.script.write_text("import megatron.core\nprint('trains with', megatron.core.__file__)\n")

    def run(self, *command: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RMOE_")}
        env |= {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, *(command or ("-m", "rmoe_megablocks.megatron.run", str(self.script)))]
        return subprocess.run(words, capture_output=True, text=True, env=env, cwd=self.folder)


def test_an_unknown_newer_megatron_warns_once_and_goes_on(tmp_path):
    done = Checkout(tmp_path, "0.21.0").run()
    lines = [line for line in done.stderr.splitlines() if line.startswith("rmoe:")]
    assert lines == ["rmoe: warning: Megatron-Core 0.21.0 was never tried, 0.19 to 0.20 were"]
    assert done.returncode == 0 and f"trains with {tmp_path}/megatron/core/__init__.py" in done.stdout


def test_a_newer_megatron_without_a_touched_name_is_one_line(tmp_path):
    checkout = Checkout(tmp_path, "0.21.0", lacks="P2PCommunicator")
    done = checkout.run()
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(
        f"rmoe: error: Megatron-Core 0.21.0 in {tmp_path} lacks "
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator (imported by rmoe_megablocks/megatron/"
    )
    assert done.stderr.endswith("check out the tag core_v0.19.0 or the main branch there\n")
    # in a program of one's own it is an exception, and an import that fails
    done = checkout.run("-c", "import rmoe_megablocks.megatron")
    assert "UnsupportedUpstream: Megatron-Core 0.21.0" in done.stderr.splitlines()[-1]
    assert issubclass(upstreams.UnsupportedUpstream, ImportError) and issubclass(
        upstreams.UnsupportedUpstream, UsageError
    )


def test_a_checkout_of_an_older_release_is_one_line_with_folder_and_tag(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = 'rc2'\n")
    (tmp_path / "script.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "core_v0.16.1"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rmoe_megablocks.megatron.run", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"rmoe: error: Megatron-Core 0.16.1rc2 (git: core_v0.16.1) in {tmp_path} is too old, 0.19 to 0.20 are "
        "supported: check out the tag core_v0.19.0 or the main branch there\n"
    )


def test_a_torch_or_megatron_that_is_missing_or_old(monkeypatch):
    monkeypatch.delenv("RMOE_CHECKED_UPSTREAMS", raising=False)
    for torch, folder, words in (
        (None, MEGATRON, "torch is not installed"),
        ("2.8.0+cu128", MEGATRON, "torch 2.8.0+cu128 is too old, 2.9 to 2.15 are supported"),
        ("2.11.0", None, "megatron-core is not installed"),
    ):
        monkeypatch.setattr(versions, "torch_version", lambda torch=torch: torch)
        monkeypatch.setattr(versions, "megatron_folder", lambda folder=folder: folder)
        with pytest.raises(upstreams.UnsupportedUpstream) as refused:
            upstreams.check()
        assert str(refused.value).startswith(words)


def test_a_newer_torch_warns_once_for_the_whole_run(monkeypatch, capsys):
    monkeypatch.delenv("RMOE_CHECKED_UPSTREAMS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(versions, "torch_version", lambda: "2.16.0")
    upstreams.check()
    assert capsys.readouterr().err == "rmoe: warning: torch 2.16.0 was never tried, 2.9 to 2.15 were\n"
    upstreams.check()  # as in a process that the first one starts
    assert capsys.readouterr().err == ""
