"""The patches for those who compile MegaBlocks and grouped_gemm themselves, against the released sources."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from rmoe_megablocks.compat.megablocks.install import build_environment

PATCHES = sorted(Path(__file__).parents[2].joinpath("patches", "megablocks").glob("*.patch"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Unpacks a release by name and version; each is downloaded once."""
    folder = tmp_path_factory.mktemp("sdists")

    def unpack(name: str, version: str) -> Path:
        target = folder / f"{name}-{version}"
        if not target.exists():
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                name,
            ]
            with build_environment() as environment:
                if name != "megablocks":  # its setup.py asks torch for a compiler; naming an architecture, for no GPU
                    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}
                options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
                result = subprocess.run([*command, f"{name}=={version}"], check=False, **options)
            if "No matching distribution" in result.stderr:
                pytest.skip(f"no package index has {name} {version}")
            assert result.returncode == 0, result.stderr
            with tarfile.open(folder / f"{name}-{version}.tar.gz") as archive:
                archive.extractall(folder, filter="data")
        return target

    return unpack


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patches_name_their_issue_and_apply(patch, sources):
    assert re.search(r"(databricks/megablocks|tgale96/grouped_gemm)#\d+", patch.read_text().partition("--- a/")[0])
    if shutil.which("patch") is None:
        pytest.skip("the command patch is not installed")
    name, version, _ = patch.stem.split("-", 2)
    command = ["patch", "--dry-run", "--fuzz=0", "-p1", "-i", patch]
    result = subprocess.run(command, cwd=sources(name, version), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert not re.search("offset|fuzz", result.stdout)  # made for this very release


def test_there_is_one_for_cuda_13_and_none_leaves_its_argument(sources, tmp_path):
    if shutil.which("patch") is None:
        pytest.skip("the command patch is not installed")
    shutil.copytree(sources("megablocks", "0.10.0"), tmp_path, dirs_exist_ok=True)
    for patch in (path for path in PATCHES if path.name.startswith("megablocks")):
        subprocess.run(["patch", "-p1", "-i", patch], cwd=tmp_path, check=True, capture_output=True)
    assert not [path for path in tmp_path.glob("csrc/*") if "debug_synchronous" in path.read_text()]
    assert "<2.7.1" not in tmp_path.joinpath("setup.py").read_text()
