"""Megatron-Core host: arguments, router, the layer that hands the state on, stage boundary, training entry.

Importing this package before Megatron is what makes Megatron run on a machine without a GPU, see
:mod:`rmoe_megablocks.compat.megatron_cpu`.
"""

from rmoe_megablocks.compat import megatron_cpu
from rmoe_megablocks.compat.megatron_version import check_megatron_version

check_megatron_version()
megatron_cpu.install()
