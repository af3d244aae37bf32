"""Code beside the weights: a folder that ``trust_remote_code=True`` loads where this package is not installed.

The files are this package's own, under flat names, with their imports of each other made relative: of the router types
the one that the model uses, and the default one, which the library makes to see what a configuration changes.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import rmoe_megablocks
from rmoe_megablocks.routing import get_router_type

from ..configuration import RmoeConfig

PACKAGE = "rmoe_megablocks"
_ROOT = Path(rmoe_megablocks.__file__).parent
_TYPES = f"{PACKAGE}.routing.types"
_NAMED = {
    f"{PACKAGE}.huggingface.configuration": "configuration_rmoe",
    f"{PACKAGE}.huggingface.modeling": "modeling_rmoe",
}
AUTO_MAP = {
    "AutoConfig": "configuration_rmoe.RmoeConfig",
    "AutoModel": "modeling_rmoe.RmoeModel",
    "AutoModelForCausalLM": "modeling_rmoe.RmoeForCausalLM",
}


def write_code(folder: str | Path, config: RmoeConfig) -> list[str]:
    """Writes the code of ``config``'s model into a folder that ``save_pretrained`` made, and its auto_map.

    Returns:
        the names of the files, sorted.

    Raises:
        ValueError: a router type that is not this package's, whose code would be missing; a model of another class.
    """
    folder = Path(folder)
    if type(config) is not RmoeConfig:
        raise ValueError(f"{type(config).__name__} cannot be written with its code: make an RmoeConfig of it")
    layers = [get_router_type(name).layer for name in {config.router_type, RmoeConfig.router_type}]
    used = sorted(layer.__module__ for layer in layers if layer is not None)
    if not all(module.startswith(_TYPES) for module in used):
        raise ValueError(
            f"router_type {config.router_type!r} is not of this package: its code cannot be put beside the weights"
        )
    files = {f"{_flat(_TYPES)}.py": "".join(_import(module, None, "_used") + "\n" for module in used)}
    waiting = [*_NAMED, *used]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name not in files:
            files[name], needed = _rewritten(module)
            waiting += needed
    for name, text in files.items():
        (folder / name).write_text(text)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n")
    return sorted(files)


def _flat(module: str) -> str:
    return _NAMED.get(module) or "rmoe_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _file(module: str) -> Path | None:
    """The source of a module or package of ours, None for what is neither."""
    path = _ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _rewritten(module: str) -> tuple[str, set[str]]:
    """The text of a module with flat imports, and the modules that it imports."""
    text = _file(module).read_text()
    lines, needed = text.splitlines(), set()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    for node in sorted(nodes, key=lambda node: -node.lineno):  # from below: line numbers above stay right
        base = node.module or ""
        if node.level:
            base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
        if not base.startswith(PACKAGE):
            continue
        found = list(_imports(base, node.names))
        needed |= {imported for imported, _ in found}
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [
            indent + line for _, statement in found for line in statement.split("\n")
        ]
    return "\n".join(lines) + "\n", needed


def _imports(base: str, names: list[ast.alias]) -> Iterator[tuple[str, str]]:
    """(a module, the statement that takes a name from it), for modules of the package and what they define."""
    for alias in names:
        if _file(f"{base}.{alias.name}") and alias.name not in _bound(base):
            yield f"{base}.{alias.name}", _import(f"{base}.{alias.name}", None, alias.asname or alias.name)
        else:
            yield base, _import(base, alias.name, alias.asname)


def _bound(module: str) -> set[str]:
    """Names that a module imports from others: a package may have a function called as one of its modules."""
    nodes = [node for node in ast.parse(_file(module).read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def _import(module: str, name: str | None, asname: str | None) -> str:
    flat = _flat(module)
    if name is not None:
        return f"from .{flat} import {name}" + (f" as {asname}" if asname else "")
    # the first line is for the library, which finds the files of a folder by this form alone
    return f"from .{flat} import __name__ as _\nfrom . import {flat} as {asname}"
