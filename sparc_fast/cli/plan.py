"""The memory of a training run, part by part, and the time of its steps, before it is begun; what would make it fit.

Exit status 0 if it fits, 3 if it does not, 1 after an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparc_fast.planning.machine import Machine
from sparc_fast.planning.plan import device_of, plan
from sparc_fast.planning.roofline import Roofline
from sparc_fast.planning.text import as_text
from sparc_fast.sizes import parse_bytes
from sparc_fast.training.config import Config

from .train import add_settings, settings_of

__all__ = ["add_arguments", "run"]

DOES_NOT_FIT = 3
"""The exit status."""
RATES = {"copy": "bytes", "float32": "FLOP", "bfloat16": "FLOP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a run, the data that are not there yet, and the machine."""
    group = parser.add_argument_group("data that are not there yet")
    group.add_argument(
        "--d-streams", nargs="+", action="extend", metavar="STREAM=WIDTH", help="widths of the streams, in order"
    )
    group.add_argument("--rows", metavar="N", help="how many rows there will be")
    group = parser.add_argument_group("the machine, by default this one, measured")
    group.add_argument("--machine-memory", metavar="SIZE", help="what a run can have, such as 80GiB")
    group.add_argument("--roofs", type=Path, metavar="FILE", help="another machine, as --save-roofs wrote it there")
    group.add_argument("--save-roofs", type=Path, metavar="FILE", help="write this machine as JSON")
    for rate, unit in RATES.items():
        group.add_argument(f"--{rate}-rate", metavar="X", help=f"{unit} a second, instead of measuring; give all three")
    parser.add_argument("--dead", default="0.5", metavar="X", help="part of the latents that are dead, for AuxK (0.5)")
    parser.add_argument("--ranks", default="1", metavar="P", help="processes of torchrun that share the latents (1)")
    parser.add_argument("--changes", action="store_true", help="show what would change memory and time in any case")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; the exit status is 0 if it fits, else 3."""
    config = Config.of(settings_of(arguments))
    d_streams = None if arguments.d_streams is None else _widths(arguments.d_streams)
    n_rows = None if arguments.rows is None else int(_number("--rows", arguments.rows, int))
    dead = _number("--dead", arguments.dead, float)
    ranks = int(_number("--ranks", arguments.ranks, int))
    found = plan(config, d_streams, n_rows, _machine(arguments, config), dead=dead, ranks=ranks)
    if arguments.save_roofs is not None:
        found.machine.save(arguments.save_roofs)
    print(as_text(found, arguments.changes))
    return 0 if found.fits else DOES_NOT_FIT


def _machine(arguments: argparse.Namespace, config: Config) -> Machine:
    memory = None if arguments.machine_memory is None else _size(arguments.machine_memory)
    rates = {rate: value for rate in RATES if (value := getattr(arguments, f"{rate}_rate")) is not None}
    if rates and len(rates) < len(RATES):
        raise ValueError(f"{', '.join(f'--{rate}-rate' for rate in RATES)} must be given together, got {list(rates)}")
    roofs = (
        Roofline(**{rate: _number(f"--{rate}-rate", value, float) for rate, value in rates.items()}) if rates else None
    )
    if arguments.roofs is None:
        return Machine.here(device_of(config), memory=memory, roofs=roofs)
    machine = Machine.load(arguments.roofs)
    return replace(machine, memory=memory or machine.memory, roofs=roofs or machine.roofs)


def _widths(texts: Sequence[str]) -> dict[str, int]:
    widths: dict[str, int] = {}
    for text in texts:
        stream, _, width = text.partition("=")
        if not stream or not width.isdigit():
            raise ValueError(f"--d-streams must be stream=width, got {text!r}")
        if stream in widths:
            raise ValueError(f"--d-streams must give each stream once, got {stream!r} twice")
        widths[stream] = int(width)
    return widths


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError:
        raise ValueError(f"--machine-memory must be a size such as 80GiB or 64GB, got {text!r}") from None


def _number(flag: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{flag} must be a number, got {text!r}")
    return number
