"""Megatron's own options, as its parser has them: built once a process, which takes a third of a second."""

import argparse
import functools

from megatron.training.arguments import add_megatron_arguments


@functools.cache
def actions() -> dict[str, argparse.Action]:
    """By the option's spelling, as ``--num-layers``."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser._option_string_actions  # argparse has no other way to ask


@functools.cache
def spelling() -> dict[str, str]:
    """The option's first spelling by the name of the attribute that it sets."""
    return {action.dest: action.option_strings[0] for action in reversed(actions().values())}
