"""The router of docs/own-router.md in a folder of its own, outside the package."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "own-router.md"
TYPE = "my_package.my_module:MyRouter"
SHORT_NAME = "mine"


def block(language: str) -> str:
    """The page's only block of ``language``."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with my_package/my_module.py."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "my_module.py").write_text(block("python"))
    return folder


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH that beside the module has what an installation of the package leaves."""
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(.*)\n', block("toml")).groups()
    folder = tmp_path_factory.mktemp("installed")
    (folder / "my_package").symlink_to(package / "my_package")
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return folder


def environment(*paths: Path) -> dict[str, str]:
    """This process's, with ``paths`` on PYTHONPATH and nothing that an earlier run said."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    env.pop("RMOE_CPU_MODE_ANNOUNCED", None)
    return env
