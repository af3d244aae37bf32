"""The process that writes asynchronous checkpoints: what it says of errors that nobody can catch."""

import io
from types import SimpleNamespace

import pytest

from rmoe_megablocks.compat import async_worker


@pytest.mark.parametrize(
    ("of", "error", "told"),
    [
        (io.BytesIO(), ValueError("flush of closed file"), False),
        (io.BytesIO(), OSError("no space left"), False),
        (io.BytesIO(), RuntimeError("anything else"), True),
        (object(), ValueError("of no file"), True),
    ],
)
def test_only_of_files_that_cannot_be_closed_nothing_is_said(monkeypatch, of, error, told):
    said = []
    monkeypatch.setattr("sys.__unraisablehook__", said.append)
    unraisable = SimpleNamespace(object=of, exc_value=error)
    async_worker._unless_of_a_file(unraisable)
    assert said == [unraisable] * told
