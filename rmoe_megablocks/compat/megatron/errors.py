"""Megatron's exceptions in one line that names the options it is about.

Most of Megatron's checks are assertions, many without a message: what failed is in its source line alone. This module
reads that line, which is why it lies here; a release that moves or words it differently changes the text, no more.
"""

import argparse
import ast
import contextlib
import functools
import linecache
import re
import traceback
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType

import torch

from rmoe_megablocks.compat.megatron.options import spelling
from rmoe_megablocks.errors import UsageError

# What Megatron's configuration classes call an argument, where they do not use the parser's name
_ALIASES = {
    "max_lr": "lr",
    "init_lr": "lr_warmup_init",
    "start_wd": "start_weight_decay",
    "end_wd": "end_weight_decay",
    "lr_warmup_steps": "lr_warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "wsd_decay_steps": "lr_wsd_decay_iters",
    "wd_incr_style": "weight_decay_incr_style",
    "num_moe_experts": "num_experts",
    "sequence_length": "seq_length",
    "tokenizer": "tokenizer_type",
}
_WRONG_VALUES = (ValueError, AssertionError, ImportError, NotImplementedError)
_SLIPS = (KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError, OverflowError, OSError)


class in_one_line(contextlib.AbstractContextManager):
    """Turns an exception by which Megatron refuses ``args`` into UsageError. Others, and UsageError itself, pass.

    ``about`` names options, with their values, for a message that does not.
    """

    def __init__(self, args: argparse.Namespace, about: str = "") -> None:
        self._args, self._about = args, about

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, UsageError) or not is_refusal(error):
            return
        text = explain(error, self._args)
        raise UsageError(text if not self._about or "--" in text else f"{self._about}: {text}") from error


def is_refusal(error: BaseException) -> bool:
    """Whether ``error`` says that Megatron cannot do what its arguments ask for.

    ValueError, AssertionError and ImportError do, wherever they come from. What a wrong value may run into, such as a
    division by zero or a file that is not there, does where it happens in Megatron's own code, and any other Exception
    where Megatron raises it.
    """
    if isinstance(error, _WRONG_VALUES):
        return True
    frame = _innermost(error.__traceback__)
    if frame is None or not _is_megatron(frame.filename):
        return False
    if isinstance(error, _SLIPS):
        return True
    return isinstance(error, Exception) and isinstance(_statement(frame)[0], ast.Raise)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that this machine's or GPU's memory, or a tensor's size, has no room for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = "can't allocate memory|Storage size calculation overflowed|numel: integer multiplication overflow"
    return isinstance(error, RuntimeError) and re.search(said, str(error)) is not None


def lost_contact(error: BaseException) -> bool:
    """Whether ``error``, or one that it was raised for, is of a collective operation whose other side is gone."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    return any(isinstance(e, RuntimeError) and re.search("gloo|NCCL|[Cc]onnection", str(e)) for e in chain)


def explain(error: BaseException, args: argparse.Namespace | None) -> str:
    """One line: Megatron's own message, or the condition that failed in terms of options, with their values."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_megatron(frame.filename)]
    frame = frames[-1] if frames else _innermost(error.__traceback__)
    own_text = " ".join(str(error).split())
    if error.__cause__ is not None and "--" not in own_text:
        own_text += f" ({type(error.__cause__).__name__}: {' '.join(str(error.__cause__).split())[:200]})"
    statement, around = _statement(frame) if frame else (None, [])
    if own_text and not isinstance(error, _SLIPS):
        named = _named_in(own_text) or _options_in([*around, *_tests(statement)])
        given = [] if "--" in own_text else _given(named, args)
        return own_text + (f" ({', '.join(given)})" if given else "")
    return _from_source(error, frame, statement, around, args)


def _from_source(error, frame, statement, around, args) -> str:
    tests = _tests(statement)
    in_tests = _options_in(tests or ([statement] if statement else []))
    around = [test for test in around if not set(_options_in([test])) <= set(in_tests)]
    if tests:
        reason = "Megatron requires " + " and ".join(map(_in_options, tests))
    else:
        reason = f"Megatron cannot do it: {type(error).__name__}: {error}".rstrip(": ")
    if around:
        reason += " with " + " and ".join(map(_in_options, around))
    given = _given(list(dict.fromkeys([*_options_in(around), *in_tests])), args)
    if given:
        reason += ", but was given " + ", ".join(given)
    return f"{reason} ({Path(frame.filename).name}:{frame.lineno})" if frame else reason


def _innermost(trace: TracebackType | None) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(trace)
    return frames[-1] if frames else None


def _is_megatron(filename: str) -> bool:
    return re.search(r"/megatron/(core|training)/", filename) is not None and "rmoe_megablocks" not in filename


def _statement(frame: traceback.FrameSummary) -> tuple[ast.stmt | None, list[ast.expr]]:
    """The statement at a frame's line, and the conditions of the branches around it that speak of options."""
    source = "".join(linecache.getlines(frame.filename))
    if not source:
        return None, []
    found, around = None, []

    def search(nodes: list[ast.stmt], conditions: list[ast.expr]) -> None:
        nonlocal found, around
        for node in nodes:
            if not node.lineno <= frame.lineno <= (node.end_lineno or node.lineno):
                continue
            found, around = node, conditions
            if isinstance(node, ast.If):
                search(node.body, [*conditions, node.test])
                search(node.orelse, [*conditions, ast.UnaryOp(ast.Not(), node.test)])
            else:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    conditions = []
                for field in ("body", "orelse", "finalbody"):
                    search(getattr(node, field, []), conditions)
                for handler in getattr(node, "handlers", []):
                    search(handler.body, conditions)

    search(_parsed(source).body, [])
    return found, [test for test in around if _options_in([test])]


@functools.lru_cache(maxsize=4)
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _tests(statement: ast.stmt | None) -> list[ast.expr]:
    return [statement.test] if isinstance(statement, ast.Assert) else []


def _dest(name: str) -> str | None:
    name = _ALIASES.get(name, name)
    return name if name in spelling() else None


def _argument(node: ast.AST) -> str | None:
    """The argument that an expression reads: ``args.x``, ``self.x`` or ``config.x``, getattr(args, "x")."""
    if isinstance(node, ast.Attribute):
        return _dest(node.attr)
    is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
    if is_getattr and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        return _dest(str(node.args[1].value))
    return None


def _options_in(nodes: list[ast.AST]) -> list[str]:
    """The arguments that ``nodes`` read, each once, in order."""
    return list(dict.fromkeys(name for node in nodes for name in _read(node)))


def _read(node: ast.AST) -> Iterator[str]:
    name = _argument(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _read(child)


def _named_in(text: str) -> list[str]:
    """Arguments that a message calls by their attributes' names, such as recompute_modules."""
    return [word for word in dict.fromkeys(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", text)) if _dest(word)]


class _Renamer(ast.NodeTransformer):
    """Writes options in the place of attributes."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        name = _argument(node)
        return ast.Name(id=spelling()[name]) if name is not None else super().generic_visit(node)

    visit = generic_visit


def _in_options(test: ast.expr) -> str:
    """A condition in words: ``--lr >= --min-lr``, ``no --bf16``."""
    text = ast.unparse(ast.fix_missing_locations(_Renamer().visit(ast.parse(ast.unparse(test), mode="eval").body)))
    text = re.sub(r"not (--[\w-]+) is not None|not \(?(--[\w-]+) is not None\)?", r"no \1\2", text)
    text = re.sub(r"(--[\w-]+) is not None", r"\1", text)
    text = re.sub(r"(--[\w-]+) is None", r"no \1", text)
    return re.sub(r"\bnot (--[\w-]+)(?![\w-]* (?:[=<>!%]|in\b|is\b))", r"no \1", text)


def _given(names: list[str], args: argparse.Namespace | None) -> list[str]:
    """Options with their values, as ``--lr 1e-05``; "no --lr" where there is none."""
    if args is None:
        return []
    dests = dict.fromkeys(_ALIASES.get(name, name) for name in names)
    return [_with_value(spelling()[dest], getattr(args, dest, None)) for dest in dests]


def _with_value(option: str, value: object) -> str:
    if value is None or value == []:
        return f"no {option}"
    if isinstance(value, bool):
        return option if value != option.startswith("--no-") else f"no {option}"
    if isinstance(value, Enum):
        value = value.name
    elif isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    elif isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"{option} {value}"
