"""Whether a training run fits a machine, what would make it fit, and how long it takes: before it is begun."""

from .machine import Machine
from .plan import plan
from .roofline import Roofline
from .text import Change, Plan

__all__ = ["Change", "Machine", "Plan", "Roofline", "plan"]
