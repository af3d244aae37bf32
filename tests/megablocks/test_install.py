"""rmoe install megablocks, for real, in an environment of its own beside a toolkit without a GPU."""

import argparse
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rmoe_megablocks.compat.megablocks import cli, install
from rmoe_megablocks.errors import UsageError

BORROWED = ("pip", "setuptools", "_distutils_hack", "torch", "triton")


@pytest.fixture
def environment(tmp_path):
    """An interpreter that sees pip, setuptools, torch and triton of this one and nothing else, and its packages."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    for name in BORROWED:
        spec = importlib.util.find_spec(name)
        if spec is None:
            pytest.skip(f"{name} is not installed here")
        source = Path(spec.origin).parent
        (packages / name).symlink_to(source, target_is_directory=True)
    for metadata in source.parent.glob("setuptools-*.dist-info"):  # it finds its own commands there
        (packages / metadata.name).symlink_to(metadata, target_is_directory=True)
    return tmp_path / "env" / "bin" / "python", packages


def test_installs_beside_a_toolkit_and_compiles_nothing(environment, monkeypatch, tmp_path, capsys):
    python, packages = environment
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    args = parser.parse_args(["install", "megablocks", "--python", str(python)])
    try:
        assert cli.run(args) == 0
    except UsageError as error:
        if "No matching distribution" in str(error) or "Could not find a version" in str(error):
            pytest.skip(f"no package index has MegaBlocks: {error}")
        raise
    assert capsys.readouterr().out == "megablocks 0.10.0 and stanford-stk 0.7.1: installed\n"
    assert {"megablocks", "stk"} <= {path.name for path in packages.iterdir()}
    assert not [path for path in packages.rglob("*.so") if not path.is_relative_to(packages / "torch")]

    # the second time does nothing, without an index too
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(install, "_run", _run_but_not_pip(install._run))
    install.install(python)


def _run_but_not_pip(run):
    def checked(command, environment):
        assert "pip" not in command
        return run(command, environment)

    return checked


def test_pips_failure_is_told(environment, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UsageError, match=r"megablocks==0.10.0.*\(pip install megablocks==0.10.0 stanford-stk==0.7.1\)"):
        install.install(environment[0])


@pytest.mark.parametrize("name", ["torch", "pip", "setuptools"])
def test_what_the_environment_lacks_is_told(environment, name):
    python, packages = environment
    (packages / name).unlink()
    with pytest.raises(UsageError, match=f"has no {name}"):
        install.install(python)


def test_no_interpreter_is_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be run"):
        install.install(tmp_path / "python")


def test_running_it_as_a_module_takes_no_torch():
    """The environment script calls it each time."""
    script = f"import sys; sys.argv[0] = 'x'; import {install.__name__}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
