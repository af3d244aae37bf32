"""What a case is, and what has to hold of its outcome."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        code: exit code; None if it had to be ended after its time limit.
        out, err: standard output and error.
        folder: where it ran.
        new: files that are there now and were not before, relative to ``folder``.
    """

    code: int | None
    out: str
    err: str
    folder: Path
    new: list[str]


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: what is odd about it, unique within its file; a row of docs/odd-inputs.md.
        command: see the package's docstring; ``{here}`` is the case's own empty folder, where it runs, and
            ``{repository}`` the repository.
        refused: a pattern which the one line of the error has to contain: the culprit, and best what to do.
        works: called with the outcome of an input that has to work; asserts that its results are right.
        files: made before, by name: text, bytes, or None for a folder; or a function of the folder.
        env: environment variables, None to remove one.
        trains: really start the processes.
        seconds: how long it may take.
    """

    name: str
    command: str
    refused: str | None = None
    works: Callable[[Outcome], None] | None = None
    files: Mapping[str, str | bytes | None] | Callable[[Path], None] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    trains: bool = False
    seconds: float = 60

    def __post_init__(self) -> None:
        if (self.refused is None) == (self.works is None):
            raise ValueError(f"{self.name}: a case is either refused, or works")

    def prepare(self, folder: Path) -> None:
        if callable(self.files):
            self.files(folder)
            return
        for name, content in self.files.items():
            path = folder / name
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                path.write_text(content)

    def check(self, outcome: Outcome) -> None:
        """AssertionError unless it ended as it should."""
        text = outcome.out + outcome.err
        assert outcome.code is not None, f"hangs; so far:\n{text}"
        assert "Traceback" not in text, text
        if self.works is not None:
            assert outcome.code == 0, f"exit code {outcome.code}\n{text}"
            self.works(outcome)
            return
        lines = error_lines(outcome)
        assert outcome.code == 2, f"exit code {outcome.code}\n{text}"
        assert len(lines) == 1, text
        assert re.search(self.refused, lines[0]), f"{self.refused!r} is not in\n{lines[0]}"
        others = [line for line in text.splitlines() if line.strip() and not line.startswith("rmoe: ")]
        assert not others, f"more than one line:\n{text}"
        assert not outcome.new, f"left behind: {outcome.new}"


def error_lines(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("rmoe: error:")]
