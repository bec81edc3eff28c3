"""Train SPARC on features in files. The same command goes on where a stopped or killed run was, bit for bit."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from sparc_fast.distributed import torchrun
from sparc_fast.sizes import counted
from sparc_fast.training.config import Config, flag, read_settings
from sparc_fast.training.progress import Display, Lines, best_display
from sparc_fast.training.trainer import Trainer

__all__ = ["add_arguments", "add_settings", "run", "settings_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file of settings, the folder, and a flag for every setting."""
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; one that is there goes on")
    parser.add_argument("--progress", choices=("auto", "lines", "none"), default="auto", help="on standard error")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The file of settings, and a flag for every setting."""
    parser.add_argument("config", nargs="?", type=Path, help="settings as TOML, JSON or YAML; comes before any flag")
    group = parser.add_argument_group("settings")
    for f in fields(Config):
        group.add_argument(_flag(f), dest=f"set_{f.name}", **_arguments(f))


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit status is 0 when the run is finished, 1 after an error, and 128 + the signal that stopped it."""
    there = arguments.out / "config.json"
    config = Config.of(settings_of(arguments, there if there.is_file() else None))
    progress: Display = {"auto": best_display, "lines": Lines, "none": Display}[arguments.progress]()
    try:
        with torchrun(), Trainer(config, arguments.out, progress=progress) as trainer:
            leads = trainer.leads
            if trainer.loader.files.matched is not None and leads:
                print(trainer.loader.files.matched, flush=True)
            outcome = trainer.run()
    except FloatingPointError as error:
        print(f"sparc-fast: {error}", file=sys.stderr)
        return 1
    if outcome.stopped_by is not None:
        return 128 + outcome.stopped_by
    if not leads:
        return 0
    print(f"{counted(outcome.step, 'step')} done; the model is {trainer.folder.model}")
    if outcome.best is not None:
        step, figure = outcome.best
        print(f"best on held-out rows: {figure:.4f} after step {step:,}, {trainer.folder.best}")
    return 0


def settings_of(arguments: argparse.Namespace, otherwise: Path | None = None) -> dict[str, Any]:
    """Those of the file (or of `otherwise`, a run that goes on), and the flags over them."""
    path = arguments.config or otherwise
    settings = read_settings(path) if path is not None else {}
    for f in fields(Config):
        given = getattr(arguments, f"set_{f.name}")
        if given is not None:
            settings[f.name] = _parsed(f, given)
    if "steps" in settings and "epochs" in settings:  # a flag takes the place of what the file says
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if getattr(arguments, f"set_{one}") is not None and getattr(arguments, f"set_{other}") is None:
                del settings[other]
    return settings


def _parsed(f: Field[Any], given: Any) -> Any:
    kind = f.metadata["kind"]
    if kind is flag:
        return given
    if kind.parse_all is not None:
        return kind.parse_all(given, _flag(f))
    try:
        return kind.parse(given)
    except ValueError:
        raise ValueError(f"{_flag(f)} must be {kind.expected}, got {given!r}") from None


def _flag(f: Field[Any]) -> str:
    return f"--{f.name.replace('_', '-')}"


def _arguments(f: Field[Any]) -> dict[str, Any]:
    kind, default = f.metadata["kind"], f.default
    words = f.metadata["help"].replace("%", "%%")
    if kind is flag:
        return {"action": argparse.BooleanOptionalAction, "help": words}
    several = {} if kind.parse_all is None else {"nargs": "+", "action": "extend"}
    shown = "" if default in (MISSING, "", None) or (several and not isinstance(default, str)) else f" ({default})"
    return {**several, "metavar": kind.metavar, "help": words + shown}
