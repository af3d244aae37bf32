"""What a run will take, computed from its arguments alone: parameters, FLOPs, memory, traffic (``rmoe plan``).

Nothing here imports torch or Megatron: their import alone takes as long as a plan may. Every figure is arithmetic on
:class:`.settings.Settings`; the tests hold it against models that Megatron builds.
"""

from rmoe_megablocks.planning.plan import Plan, make_plan
from rmoe_megablocks.planning.settings import Settings, read_settings

__all__ = ["Plan", "Settings", "make_plan", "read_settings"]
