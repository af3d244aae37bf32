"""From a typed command line to Megatron's: the same steps in the launcher, which checks, and in every worker."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.errors import UnknownArgument, UsageError
from rmoe_megablocks.launcher import options
from rmoe_megablocks.launcher.config import (
    Config,
    apply_environment,
    expand_home,
    find_config,
    load_config,
    merge,
    to_argv,
)
from rmoe_megablocks.launcher.naming import run_name

# where files go, how, and what is shown: another value of these does not make it another run
_NOT_NAMED = re.compile(
    r"--(runs-dir|save|load|ckpt-step|async-.*|(no-)?verify-integrity|log-.*|tensorboard-.*|wandb-.*|exit-.*|"
    r"skip-train|no-final-evaluation|eval-tokens)$"
)


@dataclass(frozen=True)
class Resolved:
    """What was asked for: the launcher's options, the typed rest, the configuration, and Megatron's arguments."""

    own: argparse.Namespace
    typed: list[str]
    path: Path
    config: Config
    megatron: list[str]

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Adds to a UsageError where the arguments that it names are set, if a configuration file does that."""
        try:
            yield
        except UsageError as error:
            if isinstance(error, UnknownArgument):  # it may be a misspelling of one of the launcher's own
                error.args = UnknownArgument(error.words, error.name, [*error.known, *options.names()]).args
            typed = {token.partition("=")[0] for token in self.typed}
            named = dict.fromkeys(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", str(error)))
            places = {name: self.config.places[name] for name in named if name in self.config.places}
            found = [f"{name}: {place}" for name, place in places.items() if name not in typed]
            if found:
                error.args = (f"{error} ({'; '.join(found)})",)
            raise


def resolve(argv: list[str]) -> Resolved:
    """Read the configuration that ``argv`` names, set its environment variables and merge its arguments with ``argv``.

    A run without ``--run-name`` gets one here: configuration and command line are still apart.
    """
    own, typed = options.parse([_expanded(word) for word in argv])
    _check_typed(typed)
    path = find_config(own.config)
    config = load_config(path)
    apply_environment(config)
    arguments = merge(to_argv(config.arguments), typed)
    if not any(token.partition("=")[0] == "--run-name" for token in arguments):
        named = [group for group in groups_of(typed) if not _NOT_NAMED.match(group[0].partition("=")[0])]
        # "--lr=1" and "--lr 1" are the same run
        changes = [word for option, *values in named for word in (*option.split("=", 1), *values)]
        arguments += ["--run-name", run_name(path, changes)]
    return Resolved(own, typed, path, config, arguments)


def _expanded(word: str) -> str:
    """``--name=~/x`` with the home folder, which a shell puts only at the beginning of a word."""
    name, equals, value = word.partition("=")
    return f"{name}={expand_home(value)}" if equals and name.startswith("--") else word


def _check_typed(typed: list[str]) -> None:
    """Refuses what reads like something else than Megatron's parser would make of it."""
    for group in groups_of(typed):
        if not group[0].startswith("-"):
            aside = f"; a configuration file is named by --config {group[0]}" if Path(group[0]).is_file() else ""
            raise UsageError(f"{group[0]!r} is not an argument (expected --name value){aside}")
        name, equals, _ = group[0].partition("=")
        if not equals and group[1:] in (["null"], ["None"], ["~"]):
            raise UsageError(f"{name} {group[1]}: write {name}=null to take back what the configuration says")
