"""Parsers of Megatron's arguments, by the hundred in one process."""

import functools

from megatron.training import argument_utils


def parse_docstrings_once() -> None:
    """Megatron parses the sources of its configuration classes for help texts, anew for each of its parsers."""
    factory = argument_utils.ArgumentGroupFactory
    parse = factory._get_field_docstrings

    @functools.cache
    def parsed(source: type) -> dict[str, str]:
        return parse(object.__new__(factory), source)

    factory._get_field_docstrings = lambda self, source: dict(parsed(source))
