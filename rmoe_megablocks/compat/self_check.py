"""Looks every name of Megatron that this package uses up in Megatron's sources, before anything is imported.

A release that nobody tried is worth a try if all of them are there; a missing one is told by name instead of by a
traceback of whatever stumbles over it first. Reading takes about a quarter of the time of torch's import alone.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from rmoe_megablocks.compat.touched_names import TOUCHED, Touched

_PACKAGE = Path(__file__).resolve().parents[1]


def missing_names(megatron: Path, touched: Sequence[Touched] = TOUCHED) -> list[str]:
    """What the Megatron in the folder ``megatron`` lacks: one text each, with what it is needed for."""
    missing = [f"{name} (imported by {file})" for name, file in _imported() if not _is_there(megatron, name)]
    for entry in touched:
        if not _is_there(megatron, entry.name):
            missing.append(f"{entry.name} (needed to {entry.reason})")
            continue
        lacks = set(entry.parameters) - _parameters(megatron, entry.name) if entry.parameters else ()
        missing += [f"{entry.name}({parameter}=) (needed to {entry.reason})" for parameter in sorted(lacks)]
    return missing


@functools.cache
def _imported() -> tuple[tuple[str, str], ...]:
    """("module:name", this package's file) for every import from Megatron in this package."""
    found: dict[str, str] = {}
    for file in sorted(_PACKAGE.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if "megatron." not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                for alias in node.names:
                    found.setdefault(f"{node.module}:{alias.name}", file.relative_to(_PACKAGE.parent).as_posix())
    return tuple(found.items())


def _is_there(megatron: Path, name: str) -> bool:
    module, _, path = name.partition(":")
    names = _module_names(megatron, module)
    if names is None:
        return False
    first, _, member = path.partition(".")
    if first not in names:
        # a module of a package, or what "import *" may bring
        return "*" in names or (not member and _file(megatron, f"{module}.{first}") is not None)
    return not member or member in _members(names[first])


def _parameters(megatron: Path, name: str) -> set[str]:
    """Names of a function's parameters; all that are asked for where they cannot be read."""
    module, _, path = name.partition(":")
    first, _, member = path.partition(".")
    names = _module_names(megatron, module) or {}
    node = _members(names[first])[member] if member else names[first]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return set()
    arguments = node.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _file(megatron: Path, module: str) -> Path | None:
    """The source of a module; a folder without __init__.py for itself."""
    path = megatron.joinpath(*module.split(".")[1:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return path if path.is_dir() else None


@functools.cache
def _module_names(megatron: Path, module: str) -> dict[str, ast.AST] | None:
    """Names that a module defines or imports at its top level, with what defines them; None without such a module."""
    file = _file(megatron, module)
    if file is None:
        return None
    return _defined(ast.parse(file.read_text(encoding="utf-8")).body) if file.is_file() else {}


def _members(node: ast.AST) -> dict[str, ast.AST]:
    return _defined(node.body) if isinstance(node, ast.ClassDef) else {}


def _defined(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    return {name: node for statement in body for name, node in _names_of(statement)}


def _names_of(statement: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name, statement
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0], statement
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id, statement
    else:  # if, try, with: whatever a branch defines may be there
        for block in ("body", "orelse", "finalbody"):
            for inner in getattr(statement, block, ()):
                yield from _names_of(inner)
        for handler in getattr(statement, "handlers", ()):
            for inner in handler.body:
                yield from _names_of(inner)
