"""The fused optimizer."""

from sparc_fast.optim.sparc_adam import Coming, SparcAdam

__all__ = ["Coming", "SparcAdam"]
