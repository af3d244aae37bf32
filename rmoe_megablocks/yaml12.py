"""YAML as its version 1.2 defines it (the core schema), read with line numbers: the one place that reads or writes it.

PyYAML follows version 1.1, where an unquoted ``010`` is 8, ``1:30`` is 90, ``no`` and ``on`` are booleans and ``1e-4``
is text. Here ``010`` is ten, ``1e-4`` a number, ``no``, ``1:30``, ``1_000`` and ``2024-01-01`` are text, ``0o10`` is
eight, and booleans are ``true`` and ``false`` alone. A number keeps the spelling of its file: what is a number to YAML
may be a name to the argument that it is given to, as ``1.10`` or ``007``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yamlcore import CoreLoader

from rmoe_megablocks.errors import UsageError

_TAG = "tag:yaml.org,2002:"


class YamlError(UsageError):
    """A file that cannot be read, or is not YAML 1.2; its text begins with what is wrong, without the file's name."""


class WrittenInt(int):
    """A whole number as its file spells it: ``str`` is the spelling."""

    text: str

    def __str__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A number with a fraction or exponent as its file spells it: ``str`` is the spelling."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Document:
    """A file's content.

    Attributes:
        content: mappings, lists, text, numbers, booleans and None.
        lines: the line, from 1 on, of each key of the outer mapping, ``(key,)``, and of the mappings directly in it,
            ``(outer key, key)``.
    """

    content: Any
    lines: Mapping[tuple[Any, ...], int]


class _Refused(yaml.constructor.ConstructorError):
    """What YAML allows and we do not, or what its tag belies."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(None, None, problem, node.start_mark)


class _Loader(CoreLoader):
    """yamlcore's loader; a repeated key is named, and numbers keep their spelling."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused("a key has to be a word", key_node)
            if key_node.value == "<<" and key_node.style is None:
                raise _Refused("merge keys (<<) are not part of YAML 1.2: use 'defaults: other.yaml'", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _Refused(f"duplicate key {key!r}", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """A number whose spelling Python reads alike keeps it; ``0x1F``, ``0o10`` and ``.inf`` become Python's."""
        construct = self.construct_yaml_int_core if node.tag == _TAG + "int" else self.construct_yaml_float_core
        try:
            value = construct(node)
        except (ValueError, IndexError):
            kind = "a whole number" if node.tag == _TAG + "int" else "a number"
            raise _Refused(f"{node.value[:40]!r} is not {kind} that can be read", node) from None
        kind = WrittenInt if isinstance(value, int) else WrittenFloat
        written = kind(value)
        written.text = node.value if _python_reads(kind.__base__, node.value) == value else repr(value)
        return written


_Loader.add_constructor(_TAG + "int", _Loader.number)
_Loader.add_constructor(_TAG + "float", _Loader.number)


def _python_reads(kind: type, text: str) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None


def read(path: str | os.PathLike[str]) -> Document:
    """The YAML file at ``path``. Raises YamlError, with the line where there is one."""
    path = Path(path)
    if path.is_dir():
        raise YamlError(f"{path} is a directory")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise YamlError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise YamlError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise YamlError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return parse(text)
    except YamlError as error:
        raise YamlError(f"{path}: {error}") from None


def parse(text: str) -> Document:
    """The YAML document that ``text`` is. Raises YamlError, with the line where there is one."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if loader.yaml_version not in (None, (1, 2)):
            major, minor = loader.yaml_version
            raise YamlError(f"%YAML {major}.{minor}: this file is read as YAML 1.2, leave the directive out")
        content = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "not YAML"
        line = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{line}{'' if isinstance(error, _Refused) else 'not valid YAML: '}{problem}") from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise YamlError("not valid YAML: nested too deeply") from None
    return Document(content, dict(_lines(root, depth=2)))


def _lines(node: yaml.Node | None, depth: int, above: tuple[Any, ...] = ()):
    if depth == 0 or not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        place = (*above, key.value)
        yield place, key.start_mark.line + 1
        yield from _lines(value, depth - 1, place)


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper: it quotes what either version would take for something else than text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML itself quotes what version 1.1 would not take for text
    style = None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar(_TAG + "str", text, style=style)


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_float(float(value)) if math.isfinite(value) else _represent_text(dumper, repr(value))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def parse_scalar(text: str) -> Any:
    """What an unquoted ``text`` is to YAML 1.2: text, a number, a boolean or None."""
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def write(content: Mapping[str, Any]) -> str:
    """``content`` as YAML that versions 1.1 and 1.2 read alike: what only looks like a number is quoted."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
