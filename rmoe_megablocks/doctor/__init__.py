"""The command ``rmoe doctor``: what is installed here, what that gives, and the command that mends each lack.

It looks from outside: packages that may be broken are imported in processes of their own, and Megatron is not
imported at all. Whether there is a GPU is for torch to say; an nvcc on the machine is no sign of one.
"""

from rmoe_megablocks.doctor.checks import Check
from rmoe_megablocks.doctor.report import Report, add_arguments, examine, run

__all__ = ["Check", "Report", "add_arguments", "examine", "run"]
