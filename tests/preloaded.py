"""What every training process imports and reads before its first step, for a server that forks them (forked.py)."""

import rmoe_megablocks.megatron  # noqa: F401  CPU mode before Megatron

from megatron.core.tokenizers import text  # noqa: F401  isort: skip  imports transformers
from rmoe_megablocks import data  # noqa: F401
from rmoe_megablocks.megatron import arguments, pretrain  # noqa: F401
from tests.docstrings import parse_docstrings_once

parse_docstrings_once()
arguments.parse([])  # the sources of Megatron's configuration classes have been read after this
