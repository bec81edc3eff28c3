"""Training runs that survive interruption: `Trainer`, its settings, and what reads what it leaves."""

from pathlib import Path

from .config import Config
from .config_file import read_settings
from .machine import Machine
from .metrics import read_metrics
from .planning import Plan, plan
from .sinks import Sink
from .state import load_model
from .trainer import Outcome, Trainer

__all__ = [
    "Config",
    "Machine",
    "Outcome",
    "Plan",
    "Sink",
    "Trainer",
    "load_model",
    "plan",
    "read_config",
    "read_metrics",
    "read_settings",
]


def read_config(path: str | Path) -> Config:
    """The settings in a TOML, JSON or YAML file, checked; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown or out of range, or the file is not what its suffix says.
        ImportError: the library that reads it is missing.
    """
    return Config.of(read_settings(path))
