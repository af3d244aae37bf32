"""Configuration files of a run: YAML 1.2 in Megatron's own convention.

A file has up to three top-level keys::

    defaults: base.yaml            # or a list; merged first, relative to this file, the later one wins
    ENV_VARS:                      # environment variables of the run
      CUDA_DEVICE_MAX_CONNECTIONS: 1
    MODEL_ARGS:                    # Megatron's command line
      --num-layers: 4              # "--num-layers 4"
      --swiglu: true               # a bare flag
      --load: null                 # null or false: absent, also when a file of "defaults" names it
      --data-path: [0.3, a, 0.7, b]

``${NAME}`` and ``${NAME:-default}`` in a string are replaced from the environment, and ``~/`` at its beginning by the
home folder. Relative paths among the values mean what they mean to Megatron: relative to the working directory of the
run, not to the file. A number reaches Megatron as the file spells it; :mod:`rmoe_megablocks.yaml12` says what is one.

Two rules of precedence: an argument on the command line beats the file's, and an environment variable that is
already set beats ``ENV_VARS``: who types something for one run does not expect a file to overrule it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmoe_megablocks import yaml12
from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.errors import UsageError, nearest

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
    #: where each argument is set, as "tiny.yaml, line 7"
    places: dict[str, str] = field(default_factory=dict)


def find_config(path: str | os.PathLike[str] | None) -> Path:
    """The file that ``--config`` names: relative to the working directory, else to the repository."""
    if path is None:
        return DEFAULT_CONFIG
    if not str(path).strip():
        raise ConfigError("--config is empty: name a file (an unset shell variable?)")
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
    document = _read(path)
    content = _Content(document.content, path, document.lines)
    for parent in _defaults(content):
        if not (path.parent / parent).exists():
            raise content.error(f"defaults: {path.parent / parent} does not exist", "defaults")
        _load_into(config, path.parent / parent, (*chain, resolved))
    for name, value in _environment(content).items():
        if value is None:
            config.env.pop(name, None)
        else:
            config.env[name] = value
    for name, value in _arguments(content).items():
        config.arguments[name] = value
        config.places[name] = f"{path}, line {content.lines[('MODEL_ARGS', name)]}"
    config.sources.append(path)


@dataclass(frozen=True)
class _Content:
    """What one file says, and where, for messages."""

    keys: dict[str, Any]
    path: Path
    lines: Mapping[tuple[Any, ...], int]

    def error(self, text: str, *place: Any) -> ConfigError:
        """``text`` behind the file's name and the line of the key at ``place``."""
        line = self.lines.get(tuple(str(key) for key in place))
        return ConfigError(f"configuration file {self.path}: " + (f"line {line}: " if line else "") + text)


def _read(path: Path) -> yaml12.Document:
    try:
        document = yaml12.read(path)
    except yaml12.YamlError as error:
        raise ConfigError(f"configuration file {error}") from None
    content = _Content({}, path, document.lines)
    if document.content is None:
        raise ConfigError(f"configuration file {path} is empty")
    if not isinstance(document.content, dict):
        raise content.error(f"expected the keys {', '.join(KEYS)}, found {_kind(document.content)}")
    for key in document.content:
        if isinstance(key, str) and key.startswith("--"):
            raise content.error(f"{key} belongs under MODEL_ARGS", key)
        if key not in KEYS:
            raise content.error(f"unknown key {key!r}{nearest(str(key), KEYS)} (known: {', '.join(KEYS)})", key)
    return document


def _defaults(content: _Content) -> list[str]:
    value = content.keys.get("defaults")
    names = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise content.error("defaults must be a file name or a list of file names", "defaults")
    return [_expand(name, content, "defaults") for name in names]


def _mapping(content: _Content, key: str) -> dict[Any, Any]:
    value = content.keys.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise content.error(f"{key} must be a mapping, found {_kind(value)}", key)
    return value


def _environment(content: _Content) -> dict[str, str | None]:
    result: dict[str, str | None] = {}
    for name, value in _mapping(content, "ENV_VARS").items():
        place = ("ENV_VARS", name)
        if not isinstance(name, str) or not re.fullmatch(r"[^\s=\0]+", name):
            raise content.error(f"ENV_VARS: {name!r} is not the name of a variable", *place)
        if value is None:
            result[name] = None
            continue
        if not isinstance(value, str | int | float):
            raise content.error(f"ENV_VARS: {name} must be one value, found {_kind(value)}", *place)
        # a switch in an environment variable is 1 or 0 by custom, and "True" is what few readers understand
        text = str(int(value)) if isinstance(value, bool) else str(value)
        result[name] = _expand(text, content, *place)
    return result


def _arguments(content: _Content) -> dict[str, Value]:
    result: dict[str, Value] = {}
    for name, value in _mapping(content, "MODEL_ARGS").items():
        place = ("MODEL_ARGS", name)
        if not isinstance(name, str) or not re.fullmatch(r"--[^\s=-][^\s=]*", name):
            spelled = f"--{str(name).lstrip('-')}"
            raise content.error(f"MODEL_ARGS: {name!r} is not an argument (expected {spelled}: value)", *place)
        items = value if isinstance(value, list) else [value]
        if not items:
            raise content.error(f"MODEL_ARGS: {name} is an empty list (null leaves it out)", *place)
        for item in items:
            wrong = not isinstance(item, str | int | float | None)
            if wrong or (isinstance(value, list) and (item is None or isinstance(item, bool))):
                inside = " in its list" if isinstance(value, list) else ""
                raise content.error(
                    f"MODEL_ARGS: {name} must be a value or a list of values, found {_kind(item)}{inside}", *place
                )
        expanded = [_expand(item, content, *place) if isinstance(item, str) else item for item in items]
        result[name] = expanded if isinstance(value, list) else expanded[0]
    return result


def _expand(text: str, content: _Content, *place: str) -> str:
    name = place[-1]

    def replace(match: re.Match[str]) -> str:
        variable, default = match.groups()
        # as in a shell, ":-" also replaces a variable that is set but empty
        found = os.environ.get(variable)
        if default is not None:
            return found or default
        if found is None:
            raise content.error(f"{name}: the environment variable {variable} is not set", *place)
        return found

    expanded = expand_home(_VARIABLE.sub(replace, text))
    try:
        os.fsencode(expanded)
    except UnicodeEncodeError:
        raise content.error(
            f"{name}: {ascii(expanded)} has characters that this system cannot pass on", *place
        ) from None
    if "\0" in expanded:
        raise content.error(f"{name}: {ascii(expanded)} has a NUL character", *place)
    return expanded


def expand_home(text: str) -> str:
    """``~/x`` with the home folder in it: neither a file nor ``--name=~/x`` gets that from a shell."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "nothing", str: "text"}
    return names.get(type(value), "a number")


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
        elif str(value).startswith("-"):
            argv.append(f"{name}={value}")  # argparse would take a separate "-x" for an option
        else:
            argv += [name, str(value)]
    return argv


def merge(
    argv_from_file: list[str], command_line: list[str], is_argument: Callable[[str], bool] | None = None
) -> list[str]:
    """The command line of the run: the file's arguments, then those typed, which win; of these the last.

    argparse's "the last one wins" is not enough: it can neither switch off a flag that the file sets, nor undo an
    option. So every option that the command line names is dropped from the file's arguments first, and

    * ``--name=null`` on the command line only removes what the file says (``--name=false`` does for a flag);
    * ``--no-name`` (or ``--name`` for a file's ``--no-name``) removes the file's bare flag of the opposite spelling,
      and is itself passed on only if ``is_argument`` says that Megatron has an argument so spelled.

    What removes nothing is passed on as typed: who knows Megatron's parser can tell another spelling of the same
    argument from a mistake.
    """
    merged = _without_foreign(groups_of(argv_from_file), command_line)
    for group in groups_of(command_line):
        name, _, value = group[0].partition("=")
        old = [other for other in merged if other[0].partition("=")[0] == name]
        flags = {other[0] for other in merged if len(other) == 1 and "=" not in other[0]}
        merged = [other for other in merged if other not in old]
        if len(group) == 1 and old and (value == "null" or (value == "false" and name in flags)):
            continue
        opposite = f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"
        if group == [name] and name.startswith("--") and opposite in flags:
            merged = [other for other in merged if other[0] != opposite]
            if not (is_argument or _is_megatron_argument)(name):
                continue
        merged.append(group)
    return [token for group in merged for token in group]


_ROUTER = "--moe-router-"


def _without_foreign(file: list[list[str]], command_line: list[str]) -> list[list[str]]:
    """The file's arguments without those of other router types than the one that is typed, if one is.

    A file describes its own router; with ``--moe-router-type linear`` typed beside it, gru's arguments say nothing.
    """
    option = _ROUTER + "type"
    typed = [group for group in groups_of(command_line) if group[0].partition("=")[0] == option]
    if not typed or not any(group[0].startswith(_ROUTER) for group in file):
        return file
    # torch comes with it, which the environment's variables are set for by now
    from rmoe_megablocks.routing import LINEAR, all_arguments, get_router_type

    words = [*typed[-1][0].split("=", 1)[1:], *typed[-1][1:]]
    try:
        own = get_router_type(LINEAR if words == ["null"] else " ".join(words)).arguments
    except ValueError:
        return file  # whoever parses this says what is wrong with it
    foreign = {argument.option for argument in all_arguments() if argument not in own}
    return [group for group in file if group[0].partition("=")[0] not in foreign]


def _is_megatron_argument(option: str) -> bool:
    # imported only when a command line needs it: Megatron's parser brings torch along, which takes seconds
    from rmoe_megablocks.compat import megatron_cpu

    megatron_cpu.install()  # has to precede the first import of megatron
    from rmoe_megablocks.compat.megatron.options import actions

    return option in actions()


def apply_environment(config: Config) -> None:
    """Set the file's variables, except those the user has set already."""
    for name, value in config.env.items():
        os.environ.setdefault(name, value)
