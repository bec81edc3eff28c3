"""What a plan says, and how it reads: aligned columns, and words for what is estimated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparc_fast.distributed.layout import exchanged_bytes
from sparc_fast.objective import nested_sizes
from sparc_fast.selection import LOCAL
from sparc_fast.sizes import counted
from sparc_fast.training.config import Config

from .machine import Machine
from .memory import ACCURACY, Part, Sizes, Streams, totals
from .roofline import Cost
from .time import CPU_EFFICIENCY

UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
WIDTH = 52  # of the first column


@dataclass(frozen=True)
class Change:
    """Other settings, and what they would give."""

    settings: Mapping[str, Any]
    costs: str
    """What one gives up."""
    saves: int
    """Bytes of the peak; negative where it takes more."""
    fits: bool
    step_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found; as text it is the tables that `sparc-fast plan --changes` prints."""

    config: Config
    streams: Streams
    machine: Machine
    dead: float
    """The part of the latents taken to be dead, if AuxK is on."""
    steps: int | None
    """Of the whole run; None where neither the settings nor the files say it."""
    parts: tuple[Part, ...]
    host: int | None
    """Bytes of the host beside a GPU."""
    mapped: int
    """Bytes of a checkpoint's file that are in memory while it is read, if nobody else needs it; not in the peak."""
    time: Mapping[str, Cost]
    """The phases of a step; none where the machine's roofs are not known."""
    changes: tuple[Change, ...]
    """Cheapest first."""
    ranks: int = 1
    """That share the latents."""

    def __str__(self) -> str:
        return as_text(self, changes=True)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes in each phase of the run."""
        return totals(self.parts)

    @property
    def peak(self) -> int:
        """Bytes in the phase that takes most."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    @property
    def is_close(self) -> bool:
        """Whether it fits or not is within what the peak may be off by."""
        return abs(self.peak - self.machine.memory) <= ACCURACY * self.peak

    @property
    def step_seconds(self) -> float | None:
        """On a CPU the floor over the efficiency measured there; on a GPU, where none has been, the floor itself."""
        if self.machine.roofs is None:
            return None
        floor = self.machine.roofs.floor(self.time.values())
        return floor / CPU_EFFICIENCY if self.machine.device == "cpu" else floor

    @property
    def received(self) -> dict[str, float]:
        """What -> bytes that a rank receives of the others in a step."""
        config, weight = self.config, getattr(torch, self.config.dtype).itemsize
        supports = len(self.streams.readers) if config.selection in LOCAL else 1
        auxk = config.auxk if config.auxk_coef and self.dead else 0
        sizes = config.batch_size, tuple(self.streams.d_streams.values()), config.k * supports, self.ranks
        on_gpu = self.machine.device != "cpu"
        counts = {"batch": 2, "jumprelu": 0, "local_jumprelu": 0}.get(config.selection)
        nested = nested_sizes(config.matryoshka, config.n_latents)
        return exchanged_bytes(
            *sizes, weight=weight, auxk=auxk * supports, on_gpu=on_gpu, counts=counts,
            private_k=sum(quota for _, quota, _ in Sizes(config, self.streams.d_streams).private), sizes=nested,
        )  # fmt: skip

    @property
    def hours(self) -> float | None:
        """Of all steps; not of reading, validation and checkpoints."""
        if self.steps is None or self.step_seconds is None:
            return None
        return self.steps * self.step_seconds / 3600


def as_text(plan: Plan, changes: bool = False) -> str:
    """The table of parts, the verdict, the time; the changes too where it does not fit, or they are asked for."""
    lines = [*_heading(plan), "", *_memory(plan), "", *_time(plan)]
    if plan.ranks > 1:
        lines += ["", *_exchange(plan)]
    if (changes or not plan.fits) and plan.changes:
        lines += ["", *_changes(plan)]
    return "\n".join(lines)


def show_bytes(number: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit, size in UNITS.items():
        if abs(number) >= size:
            return f"{number / size:,.1f} {unit}" if abs(number) < 100 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"


def _heading(plan: Plan) -> Iterator[str]:
    config, machine, streams = plan.config, plan.machine, plan.streams
    widths = ", ".join(f"{name} {width:,}" for name, width in streams.d_streams.items())
    rows = "number of rows not given" if streams.n_rows is None else counted(streams.n_rows, "row")
    yield f"L = {config.n_latents:,}, k = {config.k}, D = {sum(streams.d_streams.values()):,} ({widths}), {rows}"
    yield f"batches of {config.batch_size:,}, {config.dtype}, {config.selection} selection" + ", lazy" * config.lazy
    rates = ""
    if (roofs := machine.roofs) is not None:
        rates = f": copies {roofs.copy / 1e9:,.1f} GB/s, products {roofs.float32 / 1e9:,.0f} GFLOP/s float32, "
        rates += f"{roofs.bfloat16 / 1e9:,.0f} bfloat16"
    shared = f", each of {plan.ranks} ranks with its part of the latents" if plan.ranks > 1 else ""
    yield f"on {machine.name}, {counted(machine.threads, 'thread')}{rates}{shared}"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"{'memory':{WIDTH}} {'at the peak':>12} {'otherwise':>12}"
    for part in plan.parts:
        counts = plan.peak_phase in part.phases
        columns = (show_bytes(part.bytes), "") if counts else ("", show_bytes(part.bytes))
        yield f"{part.name:{WIDTH}} {columns[0]:>12} {columns[1]:>12}".rstrip()
    yield _row(f"peak, {plan.peak_phase}", show_bytes(plan.peak))
    yield _row("the machine has", show_bytes(plan.machine.memory))
    difference = show_bytes(abs(plan.machine.memory - plan.peak))
    close = f", which is less than the {ACCURACY:.0%} that this may be off by" if plan.is_close else ""
    verdict = f"It fits, with {difference} to spare" if plan.fits else f"It does not fit: {difference} too much"
    yield f"{verdict}{close}."
    if plan.parts and any(part.name.startswith("AuxK") for part in plan.parts):
        yield f"AuxK is counted with {plan.dead:.0%} of the latents dead (--dead)."
    if plan.host is not None:
        yield "Estimated from the kernels' code: nothing of it has been measured on a GPU."
        yield f"Of the host it takes {show_bytes(plan.host)}, mostly to write checkpoints."
    yield f"Reading a checkpoint maps its {show_bytes(plan.mapped)}: pages that the system takes back, not counted."


def _time(plan: Plan) -> Iterator[str]:
    roofs = plan.machine.roofs
    if roofs is None:
        rates = "--copy-rate, --float32-rate and --bfloat16-rate"
        yield f"No times, since the machine's roofs are not known: --roofs, or {rates}, give them."
        return
    yield f"{'time of a step':{WIDTH}} {'at the roofs':>12}"
    for phase, cost in plan.time.items():
        yield _row(phase, _seconds(roofs.floor([cost])))
    seconds = plan.step_seconds
    assert seconds is not None
    if plan.machine.device == "cpu":
        yield _row(f"a step, at {CPU_EFFICIENCY:.0%} of the roofs", _seconds(seconds))
        yield "That share is what four whole steps on two machines reached: 52 to 77 %. Other machines differ."
    else:
        yield _row("a step, at the roofs: the least it can take", _seconds(seconds))
    if plan.ranks > 1:
        yield "Of one rank, without what it waits for the others."
    if plan.hours is not None and plan.steps is not None:
        yield f"{counted(plan.steps, 'step')}: {_duration(plan.hours)}, without reading, validation and checkpoints."


def _exchange(plan: Plan) -> Iterator[str]:
    yield f"{'a rank receives in a step':{WIDTH}} {'bytes':>12}"
    for what, received in plan.received.items():
        yield _row(what, show_bytes(received))
    yield _row("all of it", show_bytes(sum(plan.received.values())))
    yield "It does not grow with the number of latents (docs/distributed.md)."


def _duration(hours: float) -> str:
    """In the largest unit of which there is at least one."""
    for unit, size in (("hours", 1), ("minutes", 60), ("seconds", 3600)):
        if hours * size >= 1:
            return f"{hours * size:,.1f} {unit}"
    return "less than a second"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _changes(plan: Plan) -> Iterator[str]:
    timed = plan.step_seconds is not None
    yield f"{'what changes it, cheapest first':{WIDTH}} {'saves':>12} {'a step' if timed else '':>12}  fits"
    for change in plan.changes:
        yield _change(change)


def _change(change: Change) -> str:
    settings = ", ".join(f"{name} = {_toml(value)}" for name, value in change.settings.items())
    if "memory" in change.settings:
        settings += f"  # {show_bytes(change.settings['memory'])}"
    seconds = "" if change.step_seconds is None else _seconds(change.step_seconds)
    line = f"{settings:{WIDTH}} {show_bytes(change.saves):>12} {seconds:>12}  {'yes' if change.fits else 'no'}"
    return f"{line}\n    costs {change.costs}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _row(name: str, value: str) -> str:
    return f"{name:{WIDTH}} {value:>12}"
