"""Help on arguments: all that Megatron's parser has, and the text of our own that the launcher shows at once.

That text is a file, because making it takes the seconds in which Megatron is imported::

    python -m rmoe_megablocks.megatron.command_line.help_text rmoe_megablocks/launcher/arguments_help.txt
"""

import argparse
import sys
from pathlib import Path

from rmoe_megablocks.megatron import arguments
from rmoe_megablocks.megatron.command_line import parser


def own() -> str:
    """Help on the router's arguments and the run's."""
    return parser.help_text(arguments.add_run_arguments(argparse.ArgumentParser(add_help=False)))


def megatron(word: str = "") -> str:
    """Help on all arguments, Megatron's and ours, or on those whose name or help has ``word``."""
    return parser.help_text(parser.build(arguments.add_run_arguments), word)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(own())
