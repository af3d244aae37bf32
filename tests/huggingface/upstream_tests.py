"""transformers' own common tests, from its source distribution: they are in no wheel.

Nothing of it is kept in this repository. What the sdist leaves out (tests/generation, tests/exporters, tests/utils) is
replaced by empty stand-ins: tests of generation are ours, in test_generation.py.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
import transformers

SWITCH = "RMOE_TEST_TRANSFORMERS"
_PACKAGE = "transformers_common_tests"
_STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def load() -> tuple[type, type]:
    """ModelTesterMixin and ConfigTester; the module that calls this is skipped, with the reason, where they cannot be
    had or were not asked for."""
    asked = os.environ.get(SWITCH, "")
    if not asked:
        pytest.skip(f"minutes; {SWITCH}=1 fetches the sdist by pip, {SWITCH}=FILE.tar.gz takes one that is there",
                    allow_module_level=True)  # fmt: skip
    pytest.importorskip("parameterized", reason="transformers' common tests need parameterized: pip install it")
    folder = _unpacked(_fetched() if asked == "1" else Path(asked))
    for name, path in [("", folder), *((name.partition(".")[0], None) for name in _STAND_INS)]:
        package = types.ModuleType(f"{_PACKAGE}.{name}".rstrip("."))
        package.__path__ = [str(path)] if path else []
        sys.modules[package.__name__] = package
    for name, content in _STAND_INS.items():
        module = types.ModuleType(f"{_PACKAGE}.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
    common = importlib.import_module(f"{_PACKAGE}.test_modeling_common")
    return common.ModelTesterMixin, importlib.import_module(f"{_PACKAGE}.test_configuration_common").ConfigTester


def _fetched() -> Path:
    folder = tempfile.mkdtemp(prefix="transformers_sdist_")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        folder,
    ]
    done = subprocess.run([*command, f"transformers=={transformers.__version__}"], capture_output=True, text=True)
    found = list(Path(folder).glob("transformers-*.tar.gz"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        pytest.skip(f"the source distribution of transformers cannot be fetched: {last}", allow_module_level=True)
    return found[0]


def _unpacked(archive: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="transformers_tests_"))
    with tarfile.open(archive) as file:
        file.extractall(folder, [m for m in file.getmembers() if m.name.split("/")[1:2] == ["tests"]], filter="data")
    (tests,) = folder.glob(f"transformers-{transformers.__version__}/tests")
    (tests / "__init__.py").touch()  # is in no sdist, and test_configuration_common.py loads it
    return tests
