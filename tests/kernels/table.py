"""Writes what the kernels take of a GPU into docs/kernels.md: python -m tests.kernels.table"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by python -m tests.kernels.table -->\n", "<!-- until here -->\n"
_HEADER = (
    "| kernel | operands | P | E | h | target | registers | stack | local accesses | shared KiB | tensor-core | "
    "128-bit loads |\n" + "|---" * 12 + "|\n"
)


def measured(which: str = "some") -> list[dict]:
    """The cases of tests/kernels/resources.py, compiled in a process without the interpreter."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "tests.kernels.resources", which]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def row(found: dict) -> str:
    """One line of the table."""
    cells = (
        found["kernel"], found["mode"], found["size"], found["experts"] or "-", "-" if found["h0"] else "yes",
        f"sm_{found['target']}", found["registers"], found["stack"], found["local"], f"{found['shared'] / 1024:.0f}",
        found["tensor_core"], found["wide_loads"],
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


def listed() -> set[tuple[str, ...]]:
    """What the page says it lists: kernel, operands, P, E, h, target of each row."""
    page = PAGE.read_text()
    lines = page[page.index(BEGIN) : page.index(END)].splitlines()[3:]
    return {tuple(cell.strip() for cell in line.strip("|").split("|"))[:6] for line in lines}


def names(case, target: int) -> tuple[str, ...]:
    """The first cells of a case's row."""
    found = {field.name: getattr(case, field.name) for field in fields(case)} | {"target": target}
    found |= dict.fromkeys(("registers", "stack", "local", "shared", "tensor_core", "wide_loads"), 0)
    return tuple(cell.strip() for cell in row(found).strip("|\n").split("|"))[:6]


def main() -> None:
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(before + _HEADER + "".join(map(row, measured("all"))) + after)


if __name__ == "__main__":
    main()
