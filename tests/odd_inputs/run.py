"""Finds the cases and runs them."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

from tests.odd_inputs import cases
from tests.odd_inputs.case import Case, Outcome
from tests.odd_inputs.server import REPOSITORY


def all_cases() -> dict[str, list[Case]]:
    """The cases of every file in ``cases/``, by its name."""
    found = {}
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda module: module.name):
        found[module.name] = importlib.import_module(f"{cases.__name__}.{module.name}").CASES
        names = [case.name for case in found[module.name]]
        assert len(set(names)) == len(names), f"{module.name}: names are not unique"
    return found


class Server:
    """One process that has imported everything and forks for each case."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.odd_inputs.server"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: Case, folder: Path) -> Outcome:
        """Runs ``case`` in ``folder``, which it makes."""
        folder.mkdir(parents=True)
        case.prepare(folder)
        before = _files(folder)
        command = case.command.replace("{here}", str(folder)).replace("{repository}", str(REPOSITORY))
        request = {
            "command": command,
            "folder": str(folder),
            "env": dict(case.env),
            "trains": case.trains,
            "seconds": case.seconds,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())["code"]
        out, err = (
            Path(f"{folder}{suffix}").read_text(errors="replace") if Path(f"{folder}{suffix}").exists() else ""
            for suffix in (".out", ".err")
        )
        return Outcome(code, out, err, folder, sorted(_files(folder) - before))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
