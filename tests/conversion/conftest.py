"""Checkpoints for these tests, made once: Megatron's own models of one process, saved by Megatron."""

import importlib.util
from pathlib import Path

import pytest

from tests.conversion.made import make
from tests.megatron.conftest import one_process  # noqa: F401  the process group that Megatron saves with

if importlib.util.find_spec("transformers") is None:
    from tests.huggingface.conftest import pytest_pycollect_makemodule  # noqa: F401  skips all of it

_MADE: dict[tuple[str, ...], Path] = {}


@pytest.fixture(scope="module")
def made(one_process, tmp_path_factory):  # noqa: F811
    """made(*argv) -> folder of checkpoints of a model of these arguments; the same one for all modules."""

    def get(*argv: str) -> Path:
        if argv not in _MADE:
            _MADE[argv] = make(tmp_path_factory.mktemp("made") / "checkpoints", *argv)
        return _MADE[argv]

    return get
