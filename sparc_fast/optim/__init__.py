"""The fused optimizer."""

from sparc_fast.optim.sparc_adam import SparcAdam

__all__ = ["SparcAdam"]
