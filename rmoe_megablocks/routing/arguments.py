"""What a router type lets its user choose: arguments that every host offers under one name, with one check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One argument of a router type: a class attribute beside the code that reads it, ``config[ARGUMENT]``.

    Attributes:
        option: as Megatron spells arguments, ``--moe-router-...``. MegaBlocks' Arguments has it as :attr:`dest`.
        default: its type is the argument's: a bool makes a switch, an int a whole number, a float a number.
        help: says what it does; ends in the default where that is not plain.
        choices: the words that it takes, empty for any.
        check: what is wrong with a value of the right type ("must be at least 1"), None if nothing is.
        metavar: name of the value in help texts.
        kept: whether a checkpoint belongs to its value, as for everything that changes a shape or a result. How
            weights are drawn does not: another value may continue.
    """

    option: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    check: Callable[[Any], str | None] = lambda value: None
    metavar: str | None = None
    kept: bool = True

    @property
    def dest(self) -> str:
        """The argument's name as a Python attribute."""
        return self.option.removeprefix("--").replace("-", "_")

    def read(self, text: str) -> Any:
        """``text`` as a value. Raises ValueError with one line that says what is wrong."""
        kind = type(self.default)
        try:
            value = kind(text)
        except ValueError:
            named = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise ValueError(f"invalid value: {text!r} is not {named}") from None
        return self.checked(value)

    def checked(self, value: Any) -> Any:
        """``value`` itself. Raises ValueError with one line for one that the argument does not take."""
        kind = type(self.default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is str and type(value) is int and not self.choices:
            value = str(value)  # of an argument that takes words and numbers, as a block's size
        if type(value) is not kind:
            named = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind, "a word")
            raise ValueError(f"must be {named}, got {value!r}")
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}, got {value!r}")
        if wrong := self.check(value):
            raise ValueError(f"{wrong}, got {value}")
        return value


def at_least(lowest: int) -> Callable[[int], str | None]:
    """A check for whole numbers from ``lowest`` on."""
    return lambda value: None if value >= lowest else f"must be at least {lowest}"


def above_zero(value: float) -> str | None:
    """A check for positive finite numbers."""
    return None if 0 < value < float("inf") else "must be a number above 0"


def not_negative(value: float) -> str | None:
    """A check for finite numbers from 0 on."""
    return None if 0 <= value < float("inf") else "must be a number of at least 0"
