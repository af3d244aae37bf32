"""What a run will take, computed from its arguments alone: parameters, FLOPs, memory, traffic (``rmoe plan``).

The command line is read by Megatron's own parser, so that nothing unknown to it is passed over; a recurrent router is
counted on its modules. Everything else is arithmetic on :class:`.settings.Settings`; the tests hold it against models
that Megatron builds.
"""

from rmoe_megablocks.planning.plan import Plan, make_plan
from rmoe_megablocks.planning.settings import Settings, read_settings

__all__ = ["Plan", "Settings", "make_plan", "read_settings"]
