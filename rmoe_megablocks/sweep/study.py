"""A study's file: which variants of a configuration are run with which seeds.

YAML 1.2::

    config: ../configs/tiny.yaml   # relative to the study's file
    seeds: [1, 2, 3]
    arguments:                     # of all runs, as in a configuration's MODEL_ARGS; null takes back
      --train-iters: 800
    variants:                      # the first is what the others are compared with
      linear:
        --moe-router-type: linear
      gru: {}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmoe_megablocks import yaml12
from rmoe_megablocks.errors import UsageError, nearest
from rmoe_megablocks.launcher.config import load_config, to_argv

_KEYS = ("config", "seeds", "arguments", "variants")
_OURS = ("--seed", "--run-name", "--runs-dir", "--config")


@dataclass(frozen=True)
class Planned:
    """A run of a study: its words on the launcher's command line, without name and place."""

    variant: str
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """What a file says; ``variants`` are words on the command line by name, ``varied`` the options they differ in."""

    path: Path
    config: Path
    seeds: tuple[int, ...]
    variants: Mapping[str, tuple[str, ...]]
    varied: frozenset[str]

    @property
    def runs(self) -> list[Planned]:
        """Seed by seed: an interrupted study has whole pairs."""
        return [
            Planned(name, seed, ("--config", str(self.config), *words, "--seed", str(seed)))
            for seed in self.seeds
            for name, words in self.variants.items()
        ]


def read(path: Path) -> Study:
    """Raises UsageError, one line with the file's name, for whatever is wrong with it."""
    try:
        document = yaml12.read(path)
    except yaml12.YamlError as error:
        raise UsageError(f"study {error}") from None

    def wrong(text: str, *place: str) -> UsageError:
        line = document.lines.get(place)
        return UsageError(f"study {path}: " + (f"line {line}: " if line else "") + text)

    content = document.content
    if not isinstance(content, dict):
        raise wrong(f"expected the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            raise wrong(f"unknown key {key!r}{nearest(str(key), _KEYS)} (known: {', '.join(_KEYS)})", str(key))
    missing = [key for key in _KEYS if key != "arguments" and not content.get(key)]
    if missing:
        raise wrong(f"{missing[0]} is missing")
    config = Path(os.path.abspath(path.parent / str(content["config"])))
    if not config.is_file():
        raise wrong(f"config: {config} does not exist", "config")
    load_config(config)  # what is wrong with it is said now
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is not bool and isinstance(seed, int) for seed in seeds):
        raise wrong("seeds must be a list of whole numbers", "seeds")
    if len(set(seeds)) < len(seeds):
        raise wrong("seeds has one of them twice", "seeds")
    variants = content["variants"]
    if not isinstance(variants, dict):
        raise wrong("variants must be a mapping of a name to arguments", "variants")
    for name in variants:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+][\w.+-]*", name):
            raise wrong(f"variants: {name!r} is no name for a run", "variants", str(name))
    common = _words(content.get("arguments"), "arguments", wrong)
    each = {name: _words(found, f"variants: {name}", wrong) for name, found in variants.items()}
    varied = frozenset(word.partition("=")[0] for words in each.values() for word in words if word.startswith("--"))
    of_variant = {name: (*common, *words) for name, words in each.items()}
    return Study(path, config, tuple(map(int, seeds)), of_variant, varied)


def _words(arguments: Any, where: str, wrong: Any) -> tuple[str, ...]:
    if arguments is None:
        return ()
    if not isinstance(arguments, dict):
        raise wrong(f"{where}: expected arguments (--name: value)")
    words: list[str] = []
    for name, value in arguments.items():
        if not isinstance(name, str) or not name.startswith("--"):
            raise wrong(f"{where}: {name!r} is not an argument (expected --{name}: value)")
        if name in _OURS:
            raise wrong(f"{where}: {name} is what the study decides")
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float | bool | None) for item in items):
            raise wrong(f"{where}: {name} must be a value or a list of values")
        words += [f"{name}=null"] if value in (None, False) else to_argv({name: value})
    return tuple(words)
