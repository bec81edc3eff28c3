"""Whether a training run fits a machine, what would make it fit, and how long it takes: before it is begun."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparc_fast import backends, data
from sparc_fast.data import AlignedFiles, Reader

from .config import Config
from .held_out import hold_out
from .machine import Machine
from .memory_model import Part, Streams, host_bytes, mapped_bytes, parts_of, totals
from .step_time import CPU_EFFICIENCY, Phase, step_phases

ACCURACY = 0.15
"""By which the peak may be off: the test suite holds it to that."""


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
    time: tuple[Phase, ...]
    """The phases of a step; none where the machine's roofs are not known."""
    changes: tuple[Change, ...]
    """Cheapest first."""

    def __str__(self) -> str:
        from .plan_text import as_text

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
        floor = self.machine.roofs.floor(phase.cost for phase in self.time)
        return floor / CPU_EFFICIENCY if self.machine.device == "cpu" else floor

    @property
    def hours(self) -> float | None:
        """Of all steps; not of reading, validation and checkpoints."""
        if self.steps is None or self.step_seconds is None:
            return None
        return self.steps * self.step_seconds / 3600


def plan(
    config: Config,
    d_streams: Mapping[str, int] | None = None,
    n_rows: int | None = None,
    machine: Machine | None = None,
    *,
    files: AlignedFiles | None = None,
    dead: float = 0.5,
) -> Plan:
    """The memory and time of a run, part by part, and what would change them.

    Args:
        config: the settings, as `Trainer` takes them.
        d_streams: name -> width, where the data are not there yet; otherwise ``config.data`` are opened and say it.
        n_rows: rows of the data that are not there yet. Without it the loader counts with all of ``config.memory``,
            and the length of a run given in epochs stays open.
        machine: `Machine.here()` by default.
        files: what `sparc_fast.data.open` gave, instead of ``config.data``.
        dead: the part of the latents that are dead when AuxK works hardest: their weights are copied together.

    Raises:
        ValueError: the streams' widths are not known, or an argument is out of range.
        FileNotFoundError: a file of ``config.data`` is not there, and d_streams not given.
    """
    if not 0 <= dead <= 1:
        raise ValueError(f"dead must be a number from 0 to 1, got {dead}")
    streams = _streams(config, d_streams, n_rows, files)
    machine = machine or Machine.here(device_of(config))
    _check_backend(config, machine)
    found = _outcome(config, streams, machine, dead)
    return replace(found, changes=tuple(_changes(found)))


def device_of(config: Config) -> str:
    """Where `Trainer` would train here."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _outcome(config: Config, streams: Streams, machine: Machine, dead: float) -> Plan:
    steps, on_gpu = _steps(config, streams), machine.device == "cuda"
    parts = parts_of(
        config, streams, threads=machine.threads, overhead=machine.overhead, steps=steps or 0, on_gpu=on_gpu, dead=dead
    )
    time = step_phases(config, streams.widths, machine.roofs) if machine.roofs is not None else []
    return Plan(
        config, streams, machine, dead, steps, tuple(parts),
        host_bytes(config, streams, machine.host_overhead) if on_gpu else None,
        mapped_bytes(config, streams.widths), tuple(time), (),
    )  # fmt: skip


def _steps(config: Config, streams: Streams) -> int | None:
    if config.steps or streams.n_rows is None:
        return config.steps or None
    return max(1, round(config.epochs * (streams.n_rows // config.batch_size)))


def _streams(
    config: Config, d_streams: Mapping[str, int] | None, n_rows: int | None, files: AlignedFiles | None
) -> Streams:
    if d_streams is not None:
        return _imagined(config, d_streams, n_rows)
    if n_rows is not None:
        raise ValueError(f"n_rows must be left to the files where d_streams is, got {n_rows}")
    if files is None and not config.data:
        raise ValueError("d_streams must give the width of every stream, or data name their files")
    with ExitStack() as opened:
        if files is None:
            try:
                files = opened.enter_context(data.open(config.data))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; widths of data to come are given by d_streams") from error
        if config.validation_rows:
            files, _ = hold_out(files, config.validation_rows)
        return Streams(files.readers, files.n_rows)


class _Imagined(Reader):
    """A float32 stream that is not there yet."""

    def _fill(self, start: int, out: Tensor) -> None:
        raise ValueError(f"{self.title} is not there")


def _imagined(config: Config, d_streams: Mapping[str, int], n_rows: int | None) -> Streams:
    if not d_streams or not all(isinstance(width, int) and width >= 1 for width in d_streams.values()):
        raise ValueError(f"d_streams must name at least one stream, each an integer width >= 1, got {d_streams}")
    if config.data and list(config.data) != list(d_streams):
        raise ValueError(f"d_streams must name the streams of data, {list(config.data)}, got {list(d_streams)}")
    left = None if n_rows is None else n_rows - config.validation_rows
    if left is not None and left < config.batch_size:
        raise ValueError(f"n_rows must be at least a batch beside the held-out rows, got {n_rows}")
    readers = {s: _Imagined(f"stream {s!r}", (left or 1, width), torch.float32) for s, width in d_streams.items()}
    return Streams(readers, left)


def _check_backend(config: Config, machine: Machine) -> None:
    if config.device != "auto" and config.device.partition(":")[0] != machine.device:
        raise ValueError(f"machine must be one to train on {config.device}, got {machine.name}, {machine.device}")
    known = ("cpu",) if machine.device == "cpu" else ("triton", "cuda")
    chosen = config.backend
    if chosen == "auto":
        chosen = backends.available("cpu")[0] if machine.device == "cpu" else "triton"
    if chosen not in known:
        raise ValueError(f"backend must be {' or '.join(known)} to plan for {machine.device}, got {chosen}")


def _changes(now: Plan) -> Iterator[Change]:
    """What saves memory or time, cheapest first; fewer latents last."""
    single = list(_single_changes(now))
    yield from single
    if now.fits:
        return
    together: dict[str, Any] = {}
    for saving in (change for change in single if change.saves > 0):
        together |= saving.settings
        change = _change(now, "all of these", **together)
        if change.fits:
            if len(together) > 1:
                yield change
            break
    if (n_latents := _fewer_latents(now)) is not None:
        yield _change(now, "a smaller dictionary", n_latents=n_latents)


def _with(now: Plan, **settings: Any) -> Plan:
    return _outcome(replace(now.config, **settings), now.streams, now.machine, now.dead)


def _change(now: Plan, costs: str, **settings: Any) -> Change:
    other = _with(now, **settings)
    return Change(settings, costs, now.peak - other.peak, other.fits, other.step_seconds)


def _single_changes(now: Plan) -> Iterator[Change]:
    config = now.config
    if not config.lazy and now.time:
        yield _change(now, "nothing: the same bits; pays where a batch uses few of the latents", lazy=True)
    if now.machine.device == "cpu" and (memory := _less_loader_memory(now)) is not None:
        yield _change(now, "smaller windows: data larger than them are shuffled less evenly", memory=memory)
    if config.moments == "float32":
        yield _change(now, "moments rounded to 8 bits of mantissa", moments="bfloat16")
    for dtype, costs in (
        ("bfloat16", "weights are read rounded to 8 bits of mantissa; float32 masters are kept beside them"),
        ("float32", "activations twice as wide; no masters beside the weights"),
    ):
        if config.dtype != dtype and config.dtype != "float16":
            yield _change(now, costs, dtype=dtype)
    if config.auxk and config.auxk_coef:
        yield _change(now, "dead latents stay dead", auxk=0)
    if (accumulate := _more_micro_batches(now)) is not None:
        yield _change(now, "gradients of all weights, kept over the micro-batches of a step", accumulate=accumulate)
    if (batch_size := _smaller_batch(now)) is not None:
        yield _change(now, "other training: more steps an epoch, and the learning rate to suit", batch_size=batch_size)


def _less_loader_memory(now: Plan) -> int | None:
    """The most memory, halved until the run fits, or the least that the loader can do with."""
    least, memory = None, now.config.memory // 2
    while memory >= 2**20:
        try:
            other = _with(now, memory=memory)
        except ValueError:  # too little for these files
            break
        if other.peak < now.peak:
            least = memory
            if other.fits:
                break
        memory //= 2
    return least


def _more_micro_batches(now: Plan) -> int | None:
    """The fewest micro-batches with which it fits, or else those with which it takes least; None if none takes less."""
    if now.config.lazy and now.config.moments == "bfloat16":
        return None
    found, least, accumulate = None, now.peak, 2 * now.config.accumulate
    while accumulate <= now.config.batch_size and not (found and _with(now, accumulate=found).fits):
        if (peak := _with(now, accumulate=accumulate).peak) < least:
            found, least = accumulate, peak
        accumulate *= 2
    return found


def _smaller_batch(now: Plan) -> int | None:
    """Halved until the run fits, or until that saves little."""
    found, before, size = None, now.peak, now.config.batch_size // 2
    while size >= 64:
        other = _with(now, batch_size=size)
        if before - other.peak < 0.02 * now.peak:
            break
        found, before = size, other.peak
        if other.fits:
            break
        size //= 2
    return found


def _fewer_latents(now: Plan) -> int | None:
    """The most, in steps of 64, that fit; None where none do."""
    least = math.ceil(max(now.config.k, now.config.k_start) / 64)
    if not _with(now, n_latents=64 * least).fits:
        return None
    low, high = least, math.ceil(now.config.n_latents / 64)  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _with(now, n_latents=64 * middle).fits else (low, middle)
    return 64 * low
