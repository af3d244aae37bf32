"""Configuration files of a run: YAML in Megatron's own convention.

A file has up to three top-level keys::

    defaults: base.yaml            # or a list; merged first, relative to this file, the later one wins
    ENV_VARS:                      # environment variables of the run
      CUDA_DEVICE_MAX_CONNECTIONS: 1
    MODEL_ARGS:                    # Megatron's command line
      --num-layers: 4              # "--num-layers 4"
      --swiglu: true               # a bare flag
      --load: null                 # null or false: absent, also when a file of "defaults" names it
      --data-path: [0.3, a, 0.7, b]

``${NAME}`` and ``${NAME:-default}`` in a string are replaced from the environment. Relative paths among the values
mean what they mean to Megatron: relative to the working directory of the run, not to the file.

Two rules of precedence: an argument on the command line beats the file's, and an environment variable that is
already set beats ``ENV_VARS``: who types something for one run does not expect a file to overrule it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rmoe_megablocks.errors import UsageError

Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar]

KEYS = ("defaults", "ENV_VARS", "MODEL_ARGS")
REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = REPOSITORY / "configs" / "tiny.yaml"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class ConfigError(UsageError):
    """A configuration file that cannot be read or does not follow the convention."""


@dataclass
class Config:
    """A configuration file with its ``defaults`` merged in."""

    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Value] = field(default_factory=dict)
    #: every file that took part, in the order of merging: the last one won
    sources: list[Path] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """The safe loader, with a repeated key as an error: YAML's silent "last one wins" hides a typing mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def find_config(path: str | os.PathLike[str] | None) -> Path:
    """The file that ``--config`` names: relative to the working directory, else to the repository."""
    if path is None:
        return DEFAULT_CONFIG
    given = Path(path).expanduser()
    if not given.exists() and not given.is_absolute() and (REPOSITORY / given).exists():
        return REPOSITORY / given
    return given


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read ``path`` and the files its ``defaults`` name. Raises ConfigError with one line on anything wrong."""
    config = Config()
    _load_into(config, Path(path), chain=())
    return config


def _load_into(config: Config, path: Path, chain: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(str(p) for p in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"configuration files include each other in a circle: {circle}")
    content = _read(path)
    for parent in _defaults(content, path):
        _load_into(config, path.parent / parent, (*chain, resolved))
    config.env.update(_environment(content, path))
    config.arguments.update(_arguments(content, path))
    config.sources.append(path)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"configuration file {path} is a directory")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {path} is not UTF-8 text") from None
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader: constructs plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = error.problem or error.context or "not YAML"
        kind = "" if problem.startswith("duplicate key") else "not valid YAML: "
        raise ConfigError(f"configuration file {path}: {line}{kind}{problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a scalar that YAML takes for a date or number and Python refuses, as 2024-13-45
        raise ConfigError(f"configuration file {path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if content is None:
        raise ConfigError(f"configuration file {path} is empty")
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path}: expected the keys {', '.join(KEYS)}, found {_kind(content)}")
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"configuration file {path}: unknown key {key!r} (known: {', '.join(KEYS)})")
    return content


def _defaults(content: dict[str, Any], path: Path) -> list[str]:
    value = content.get("defaults")
    names = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"configuration file {path}: defaults must be a file name or a list of file names")
    return [_expand(name, path, "defaults") for name in names]


def _mapping(content: dict[str, Any], key: str, path: Path) -> dict[Any, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"configuration file {path}: {key} must be a mapping, found {_kind(value)}")
    return value


def _environment(content: dict[str, Any], path: Path) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, value in _mapping(content, "ENV_VARS", path).items():
        if not isinstance(name, str) or not name or "=" in name:
            raise ConfigError(f"configuration file {path}: ENV_VARS: {name!r} is not the name of a variable")
        if value is None:
            continue
        if not isinstance(value, str | int | float):
            raise ConfigError(f"configuration file {path}: ENV_VARS: {name} must be one value, found {_kind(value)}")
        # a switch in an environment variable is 1 or 0 by custom, and "True" is what few readers understand
        text = str(int(value)) if isinstance(value, bool) else str(value)
        result[name] = _expand(text, path, name)
    return result


def _arguments(content: dict[str, Any], path: Path) -> dict[str, Value]:
    result: dict[str, Value] = {}
    for name, value in _mapping(content, "MODEL_ARGS", path).items():
        if not isinstance(name, str) or not re.fullmatch(r"--[^\s=-][^\s=]*", name):
            raise ConfigError(
                f"configuration file {path}: MODEL_ARGS: {name!r} is not an argument (expected --name: value)"
            )
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ConfigError(f"configuration file {path}: MODEL_ARGS: {name} is an empty list (null leaves it out)")
        for item in items:
            wrong = not isinstance(item, str | int | float | None)
            if wrong or (isinstance(value, list) and (item is None or isinstance(item, bool))):
                inside = " in its list" if isinstance(value, list) else ""
                raise ConfigError(
                    f"configuration file {path}: MODEL_ARGS: {name} must be a value or a list of values, "
                    f"found {_kind(item)}{inside}"
                )
        expanded = [_expand(item, path, name) if isinstance(item, str) else item for item in items]
        result[name] = expanded if isinstance(value, list) else expanded[0]
    return result


def _expand(text: str, path: Path, name: str) -> str:
    def replace(match: re.Match[str]) -> str:
        variable, default = match.groups()
        # as in a shell, ":-" also replaces a variable that is set but empty
        found = os.environ.get(variable)
        if default is not None:
            return found or default
        if found is None:
            raise ConfigError(f"configuration file {path}: {name}: the environment variable {variable} is not set")
        return found

    return _VARIABLE.sub(replace, text)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "nothing", str: "text"}
    return names.get(type(value), type(value).__name__)


def to_argv(arguments: Mapping[str, Value]) -> list[str]:
    """The arguments as Megatron's command line."""
    argv: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        if value is True:
            argv.append(name)
        elif isinstance(value, list):
            argv += [name, *(str(item) for item in value)]
        elif isinstance(value, str) and value.startswith("-"):
            argv.append(f"{name}={value}")  # argparse would take a separate "-x" for an option
        else:
            argv += [name, str(value)]
    return argv


def merge(
    argv_from_file: list[str], command_line: list[str], is_argument: Callable[[str], bool] | None = None
) -> list[str]:
    """The command line of the run: the file's arguments, then those typed, which win.

    argparse's "the last one wins" is not enough: it can neither switch off a flag that the file sets, nor undo an
    option. So every option that the command line names is dropped from the file's arguments first, and

    * ``--name=null`` on the command line only removes what the file says (``--name=false`` does for a flag);
    * ``--no-name`` (or ``--name`` for a file's ``--no-name``) removes the file's bare flag of the opposite spelling,
      and is itself passed on only if ``is_argument`` says that Megatron has an argument so spelled.
    """
    groups = groups_of(argv_from_file)
    flags = {group[0] for group in groups if len(group) == 1 and "=" not in group[0]}
    dropped: set[str] = set()
    kept: list[str] = []
    for group in groups_of(command_line):
        name, _, value = group[0].partition("=")
        dropped.add(name)
        if len(group) == 1 and (value == "null" or (value == "false" and name in flags)):
            continue
        opposite = f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"
        if group == [name] and name.startswith("--") and opposite in flags:
            dropped.add(opposite)
            if not (is_argument or _is_megatron_argument)(name):
                continue
        kept += group
    return [token for group in groups if group[0].partition("=")[0] not in dropped for token in group] + kept


def groups_of(argv: list[str]) -> list[list[str]]:
    """``argv`` cut before every option: an option with the values that follow it."""
    groups: list[list[str]] = []
    for token in argv:
        if (token.startswith("--") and len(token) > 2) or not groups:
            groups.append([token])
        else:
            groups[-1].append(token)
    return groups


def _is_megatron_argument(option: str) -> bool:
    # imported only when a command line needs it: Megatron's parser brings torch along, which takes seconds
    import argparse

    from rmoe_megablocks.compat import megatron_cpu

    megatron_cpu.install()  # has to precede the first import of megatron
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return option in parser._option_string_actions


def apply_environment(config: Config) -> None:
    """Set the file's variables, except those the user has set already."""
    for name, value in config.env.items():
        os.environ.setdefault(name, value)
