"""The memory of a training run, part by part, and the time of its steps, before it is begun; what would make it fit.

Exit status 0 if it fits, 3 if it does not, 1 after an error.
"""

from sparc_fast.planning.command import add_arguments, run

__all__ = ["add_arguments", "run"]
