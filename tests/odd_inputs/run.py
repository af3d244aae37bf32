"""Finds the cases and runs them."""

import importlib
import pkgutil
from pathlib import Path

from tests.odd_inputs import cases
from tests.odd_inputs.case import Case, Outcome
from tests.odd_inputs.client import client


def all_cases() -> dict[str, list[Case]]:
    """The cases of every file in ``cases/``, by its name."""
    found = {}
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda module: module.name):
        found[module.name] = importlib.import_module(f"{cases.__name__}.{module.name}").CASES
        names = [case.name for case in found[module.name]]
        assert len(set(names)) == len(names), f"{module.name}: names are not unique"
    return found


def run(case: Case, folder: Path) -> Outcome:
    """Runs ``case`` in ``folder``, which it makes."""
    folder.mkdir(parents=True)
    case.prepare(folder)
    before = _files(folder)
    code = client().run(case.command, folder, case.env, case.trains, case.seconds)
    out, err = (
        Path(f"{folder}{suffix}").read_text(errors="replace") if Path(f"{folder}{suffix}").exists() else ""
        for suffix in (".out", ".err")
    )
    return Outcome(code, out, err, folder, sorted(_files(folder) - before))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
