"""Finds arguments of the installed Megatron that nothing reads: ``python -m tests.megatron.checks.dead_arguments``.

An argument counts as read where its name is loaded as an attribute or is a word of its own in a string, anywhere in
megatron.core, megatron.training and this package, but not in the parser, in ``validate_args`` or in modules of other
programs than the pretraining of GPT models.
"""

import argparse
import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import rmoe_megablocks.megatron  # CPU mode before Megatron

import megatron.core as megatron_core  # isort: skip  after CPU mode

# Modules that a run of rmoe_megablocks.megatron.pretrain does not enter
_OTHER_PROGRAMS = (
    "core/export",
    "core/inference",
    "core/models/T5",
    "core/models/bert",
    "core/models/hybrid",
    "core/models/mimo",
    "core/models/multimodal",
    "core/models/vision",
    "core/post_training",
    "core/resharding",
    "core/ssm",
    "training/config/inference_config.py",
    "training/inprocess_restart.py",
    "training/models/hybrid.py",
    "training/yaml_arguments.py",
)
_CHECKS = ("validate_args", "_print_args")
# Read by a name that is put together: f"{prefix}_{name}" (emerging_optimizers.py) and vars(args)
_BY_REFLECTION = ("muon_", "adaptive_muon_", "lion_", "soap_")


def unread(parser: argparse.ArgumentParser) -> set[str]:
    """The options, by their first spelling, of arguments that nothing in a run reads."""
    dests = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    read = set()
    for name, tree in _sources():
        if not name.startswith(_OTHER_PROGRAMS):
            read.update(_words(tree))
    return {
        option
        for dest, option in dests.items()
        if dest not in read and not dest.startswith(_BY_REFLECTION) and option != "-h"
    }


def _sources() -> Iterator[tuple[str, ast.Module]]:
    megatron, ours = Path(megatron_core.__file__).parents[1], Path(rmoe_megablocks.__file__).parent
    for root, folders in ((megatron, ("core", "training")), (ours, (".",))):
        for folder in folders:
            for file in (root / folder).rglob("*.py"):
                if file.name not in ("dead_arguments.py", "values.py"):
                    with warnings.catch_warnings(action="ignore"):  # of Megatron's escape sequences
                        yield file.relative_to(root).as_posix(), ast.parse(file.read_text())


def _words(tree: ast.Module) -> Iterator[str]:
    """Names that code reads: attributes that are loaded, and strings, but no docstrings and no parser's definitions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef) and node.name in _CHECKS:
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("add_argument", "ArgumentGroupFactory"):
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ArgumentGroupFactory":
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        pending.extend(ast.iter_child_nodes(node))


if __name__ == "__main__":
    from megatron.training.arguments import add_megatron_arguments

    print(*sorted(unread(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))), sep="\n")
