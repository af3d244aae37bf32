"""Megatron's parser with our arguments, and every word of a command line held against it before it parses.

argparse reports some mistakes as tracebacks (an enum's unknown name), some without the culprit, and takes a few for
what they are not (an empty value of an unset shell variable, ``--flag=false``). Here each has its line.
"""

import argparse
import copy
import enum
import math
from collections.abc import Callable, Sequence

from megatron.training.arguments import add_megatron_arguments

from rmoe_megablocks.command_line import groups_of
from rmoe_megablocks.errors import UnknownArgument, UsageError, nearest

#: What the functions that turn words into Megatron's values raise for a word that is none.
_NO_VALUE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
)
#: letters from which on a list of choices goes into an argument's help instead of its name
_LONG = 40
_KINDS = {int: "a whole number", float: "a number"}

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def build(add_arguments: AddArguments) -> argparse.ArgumentParser:
    """Megatron's parser with the arguments that ``add_arguments`` adds."""
    return with_usage_errors(add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))))


def with_usage_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``parser``, which raises UsageError from here on, and ends nothing."""

    def error(message: str) -> None:
        raise UsageError(message)

    parser.error = error
    return parser


def check(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """``argv`` as ``parser`` takes it: each argument once, the last one wins, under any of its names.

    ``--name=null`` takes back what was said before; ``--flag=false`` and ``--flag=true`` switch.

    Raises:
        UsageError: one line about the first word that ``parser`` would not take, or would misread.
    """
    kept: dict[int, list[str]] = {}  # by the identity of the parser's action
    for group in groups_of(argv):
        name, equals, first = group[0].partition("=")
        action = _options(parser).get(name)
        if not name.startswith("--") or name == "--":
            raise UsageError(f"{name!r} is not an argument (expected --name value)")
        if action is None:
            raise UnknownArgument(" ".join(group), name, _options(parser))
        values = [first, *group[1:]] if equals else group[1:]
        kept.pop(id(action), None)
        if equals and values == ["null"]:
            continue
        words = _switch(action, name, values, bool(equals)) if action.nargs == 0 else _valued(action, name, values)
        if words:
            kept[id(action)] = words
    return [word for words in kept.values() for word in words]


def as_config(argv: Sequence[str], parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, object]:
    """Checked arguments as a configuration file spells them: what ``parser`` made a number is one there.

    Args:
        argv: from :func:`check`.
        args: what ``parser`` made of ``argv``.
    """
    config: dict[str, object] = {}
    for group in groups_of(argv):
        name, equals, first = group[0].partition("=")
        action = _options(parser)[name]
        values = [first, *group[1:]] if equals else group[1:]
        parsed = getattr(args, action.dest)
        parsed = parsed if isinstance(parsed, list) and action.nargs not in (None, 0) else [parsed]
        if values and len(parsed) == len(values) and all(_is_number(value) for value in parsed):
            values = parsed
        config[name] = (values if len(values) > 1 else values[0]) if values else True
    return config


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions  # argparse has no other way to ask


def _switch(action: argparse.Action, name: str, values: list[str], equals: bool) -> list[str]:
    """A flag's words: none where it is switched off."""
    if not values or (equals and values == ["true"]):
        return [name]
    if equals and values == ["false"]:
        if isinstance(action, argparse.BooleanOptionalAction):
            off = name.removeprefix("--no-")
            return ["--" + off if off != name else "--no-" + name.removeprefix("--")]
        return []
    raise UsageError(
        f"argument {name}: takes no value, found {' '.join(values)!r}: it is switched on by {name} (true in a file), "
        f"off by {name}=false"
    )


def _valued(action: argparse.Action, name: str, values: list[str]) -> list[str]:
    """An argument's name and values, each of which it takes."""
    argument = f"argument {name}:"
    if any(not value.strip() for value in values):
        raise UsageError(f"{argument} the value is empty (an unset variable?); {name}=null leaves the argument out")
    if action.nargs is None:
        if not values:
            raise UsageError(f"{argument} expected one value")
        if len(values) > 1:
            raise UsageError(f"{argument} takes one value, found {len(values)}: {' '.join(values)}")
        if values[0] in ("false", "true") and action.type in (None, str) and not action.choices:
            raise UsageError(f"{argument} takes a value, not {values[0]}; {name}=null leaves it out")
    if action.type is bool:
        raise UsageError(f"{argument} Megatron takes every value for true, also false: leave it out")
    for value in values:
        _check_value(action, argument, value)
    if len(values) == 1 and values[0].startswith("-"):
        return [f"{name}={values[0]}"]  # argparse would take it for an option
    return [name, *values]


def _check_value(action: argparse.Action, argument: str, value: str) -> None:
    choices = _choices(action)
    if choices and value not in choices:
        raise UsageError(
            f"{argument} invalid choice: {value!r}{nearest(value, choices)} (choose from {', '.join(choices)})"
        )
    if action.type in (None, str) or choices:
        return
    try:
        read = action.type(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{argument} {error}") from None
    except _NO_VALUE as error:
        if action.type in _KINDS:
            raise UsageError(f"{argument} invalid value: {value!r} is not {_KINDS[action.type]}") from None
        reason = f" ({error})" if str(error) else ""
        raise UsageError(f"{argument} invalid value: {value!r}{reason}") from None
    if isinstance(read, float) and math.isnan(read):
        raise UsageError(f"{argument} invalid value: {value!r} is not a number")


def _choices(action: argparse.Action) -> list[str]:
    """The words that an argument takes, none where it has no list of them."""
    return [choice.name if isinstance(choice, enum.Enum) else str(choice) for choice in action.choices or ()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Formatter(argparse.HelpFormatter):
    """Some help of Megatron's has a bare %, at which argparse stops."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (KeyError, TypeError, ValueError):
            return action.help


def help_text(parser: argparse.ArgumentParser, word: str = "") -> str:
    """Help on the arguments of ``parser``, each with its default.

    Args:
        word: only those whose name or help has it, whatever its case.
    """
    formatter = _Formatter("", max_help_position=28, width=79)
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if _mentions(action, word)]
        if shown:
            formatter.start_section(group.title)
            formatter.add_arguments([_with_default(action) for action in shown])
            formatter.end_section()
    return formatter.format_help()


def _mentions(action: argparse.Action, word: str) -> bool:
    text = " ".join([*action.option_strings, str(action.help or "")]).lower()
    return word.lower().lstrip("-") in text


def _with_default(action: argparse.Action) -> argparse.Action:
    """``action`` with its default, and with a long list of choices, in its help."""
    text, aside = action.help or "", []
    choices = ", ".join(_choices(action))
    aside_choices = len(choices) > _LONG or any(isinstance(choice, enum.Enum) for choice in action.choices or ())
    if aside_choices:
        aside.append(f"one of {choices}")
    default = action.default.name if isinstance(action.default, enum.Enum) else action.default
    if action.nargs != 0 and default not in (None, argparse.SUPPRESS, "") and default != [] and "efault" not in text:
        aside.append(f"default {default}")
    if text is argparse.SUPPRESS or not aside:
        return action
    shown = copy.copy(action)
    shown.help = f"{text} ({'; '.join(aside)})".replace("%", "%%") if "%" not in text else text
    if aside_choices:
        shown.metavar, shown.choices = action.metavar or action.dest.upper(), None
    return shown
