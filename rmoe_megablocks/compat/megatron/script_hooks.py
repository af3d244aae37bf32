"""What the wrapper for existing jobs (:mod:`rmoe_megablocks.megatron.run`) replaces in ``megatron.training``.

It happens before the script is run, so that its ``from megatron.training... import`` gets the replacements. All of
them are idempotent: a second call replaces the first one's.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import megatron.training
from megatron.training import argument_utils, arguments, training

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def extend_parse_args(add_arguments: AddArguments, on_parsed: Callable[[argparse.Namespace], None]) -> None:
    """Adds arguments to those of Megatron and the script, and shows them as soon as they are parsed.

    ``parse_and_validate_args``, in-process restart and fault tolerance look ``arguments.parse_args`` up when called
    (arguments.py:88, inprocess_restart.py:133, ft_integration.py:78).
    """
    original = _original(arguments.parse_args)

    @functools.wraps(original)
    def parse_args(extra_args_provider: AddArguments | None = None, ignore_unknown_args: bool = False):
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return add_arguments(extra_args_provider(parser) if extra_args_provider else parser)

        args = original(provider, ignore_unknown_args)
        on_parsed(args)
        return args

    arguments.parse_args = _replacement(parse_args, original)


def extend_gpt_config(change: Callable[[Any, argparse.Namespace], None]) -> None:
    """Calls ``change(model_config, args)`` on every model configuration that ``gpt_config_from_args`` makes."""
    original = _original(argument_utils.gpt_config_from_args)

    @functools.wraps(original)
    def gpt_config_from_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        model_config = original(args, *rest, **kwargs)
        change(model_config, args)
        return model_config

    argument_utils.gpt_config_from_args = _replacement(gpt_config_from_args, original)


def check_before_pretrain(check: Callable[[Any], None]) -> None:
    """Calls ``check(model_config)`` before training; None where the script gives a model provider instead."""
    original = _original(training.pretrain)

    @functools.wraps(original)
    def pretrain(cfg_container: Any, *rest: Any, **kwargs: Any) -> Any:
        check(getattr(cfg_container, "model", None))
        return original(cfg_container, *rest, **kwargs)

    training.pretrain = megatron.training.pretrain = _replacement(pretrain, original)


def _original(function: Callable) -> Callable:
    return getattr(function, "before_rmoe", function)


def _replacement(function: Callable, original: Callable) -> Callable:
    function.before_rmoe = original
    return function
