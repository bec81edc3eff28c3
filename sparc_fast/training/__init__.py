"""Training runs that survive interruption: `Trainer`, its settings, and what reads what it leaves."""

from typing import Any

from .checkpoints import load_model
from .config import Config, read_config, read_settings
from .metrics import Sink, read_metrics
from .progress import best_display
from .trainer import Outcome, Trainer

__all__ = [
    "Config",
    "Outcome",
    "Sink",
    "Trainer",
    "best_display",
    "load_model",
    "read_config",
    "read_metrics",
    "read_settings",
]


def __getattr__(name: str) -> Any:
    if name not in ("Machine", "Plan", "plan"):  # their home is sparc_fast.planning, which reads settings from here
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparc_fast import planning

    return getattr(planning, name)
