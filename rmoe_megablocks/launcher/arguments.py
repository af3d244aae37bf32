"""From a typed command line to Megatron's: the same steps in the launcher, which checks, and in every worker."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from rmoe_megablocks.launcher import options
from rmoe_megablocks.launcher.config import (
    Config,
    apply_environment,
    find_config,
    groups_of,
    load_config,
    merge,
    to_argv,
)
from rmoe_megablocks.launcher.naming import run_name

# where files go, how, and what is shown: another value of these does not make it another run
_NOT_NAMED = re.compile(
    r"--(runs-dir|save|load|ckpt-step|async-.*|(no-)?verify-integrity|log-.*|tensorboard-.*|wandb-.*|exit-.*)$"
)


@dataclass(frozen=True)
class Resolved:
    """What was asked for: the launcher's options, the typed rest, the configuration, and Megatron's arguments."""

    own: argparse.Namespace
    typed: list[str]
    path: Path
    config: Config
    megatron: list[str]


def resolve(argv: list[str]) -> Resolved:
    """Read the configuration that ``argv`` names, set its environment variables and merge its arguments with ``argv``.

    A run without ``--run-name`` gets one here: configuration and command line are still apart.
    """
    own, typed = options.parse(argv)
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
