"""Megatron-Core host: arguments, router, the layer that hands the state on, stage boundary, training entry.

Importing this package before Megatron is what makes Megatron run on a machine without a GPU, see
:mod:`rmoe_megablocks.compat.megatron_cpu`.
"""

import sys
from pathlib import Path

from rmoe_megablocks.compat import upstreams
from rmoe_megablocks.process import report_from_rank

# While Python looks for the module of "python -m rmoe_megablocks.megatron.run script.py", which imports this package:
_IS_WRAPPER = sys.argv[:1] == ["-m"] and "rmoe_megablocks.megatron.run" in sys.orig_argv

if _IS_WRAPPER:
    # Megatron's place has to be clear before it is imported, and no caller is there yet to catch an error.
    upstreams.prefer_megatron_beside(Path(*sys.argv[1:2]))
    try:
        upstreams.check()
    except upstreams.UnsupportedUpstream as error:
        report_from_rank(error)
        sys.exit(2)
else:
    upstreams.check()

from rmoe_megablocks.compat import megatron_cpu  # noqa: E402  imports torch

megatron_cpu.install()
