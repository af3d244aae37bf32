"""Writes docs/odd-inputs.md: ``python -m tests.odd_inputs.table`` runs every case and lists how it ended."""

import re
import sys
import tempfile
from pathlib import Path

from tests.odd_inputs.case import Case, Outcome, error_lines
from tests.odd_inputs.client import client
from tests.odd_inputs.run import all_cases, run
from tests.odd_inputs.server import REPOSITORY

PAGE = REPOSITORY / "docs" / "odd-inputs.md"
HEADER = """# Odd inputs

What a wrong or unusual input ends in: written by `python -m tests.odd_inputs.table`, which runs every row and fails
where one ends otherwise. *Works* is exit code 0 with results that the row's test holds against the right ones; a quoted
line is all that is printed, with exit code 2, before anything is trained, and no file is left behind.
"""


def main() -> int:
    pages, bad, count = [HEADER], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for part, cases in all_cases().items():
            rows = []
            for number, case in enumerate(cases):
                outcome = run(case, Path(scratch) / part / str(number))
                count += 1
                try:
                    case.check(outcome)
                except AssertionError as error:
                    bad.append(f"{part}: {case.name}: {error}")
                rows.append(f"| {_cell(case.name)} | {_cell(_ending(case, outcome))} |")
            pages.append(f"\n## {part.replace('_', ' ').capitalize()}\n\n| input | ends with |\n|---|---|")
            pages += rows
    client().close()
    print(f"{count} cases, {len(bad)} ended otherwise", *bad, sep="\n")
    if not bad:
        PAGE.write_text("\n".join(pages) + "\n")
    return len(bad) > 0


def _ending(case: Case, outcome: Outcome) -> str:
    if case.works is not None:
        return "works"
    line = (error_lines(outcome) or [""])[0].removeprefix("rmoe: error: ")
    for path in (str(outcome.folder) + "/", str(outcome.folder), str(REPOSITORY) + "/"):
        line = line.replace(path, "")
    line = re.sub(r"process \d+ on \S+, since [\d-]+ [\d:]+", "process N on HOST, since TIME", line)  # alike each time
    return re.sub(r"\s+", " ", f"`{line}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
