"""Whether a training run fits a machine, what would make it fit, and how long it takes: before it is begun."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparc_fast.data import AlignedFiles, Reader
from sparc_fast.ops import backends
from sparc_fast.selection.private import Private
from sparc_fast.training.config import Config, open_files, streams_of
from sparc_fast.training.validation import hold_out

from .machine import Machine
from .memory import Streams, host_bytes, mapped_bytes, parts_of
from .text import Change, Plan
from .time import step_costs

LITTLE = 0.02
"""The part of the peak that a change must save to be worth its price, unless the run then fits."""


def plan(
    config: Config,
    d_streams: Mapping[str, int] | None = None,
    n_rows: int | None = None,
    machine: Machine | None = None,
    *,
    files: AlignedFiles | None = None,
    dead: float = 0.5,
    ranks: int = 1,
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
        ranks: processes that share the latents, each on a machine, or a device, like this one; memory and time are
            those of one of them, without what it waits for others.

    Raises:
        ValueError: the streams' widths are not known, or an argument is out of range.
        FileNotFoundError: a file of ``config.data`` is not there, and d_streams not given.
    """
    if not 0 <= dead <= 1:
        raise ValueError(f"dead must be a number from 0 to 1, got {dead}")
    if ranks < 1 or -(-config.n_latents // ranks) * (ranks - 1) >= config.n_latents:
        raise ValueError(f"ranks must be at least 1, and n_latents={config.n_latents} enough for each, got {ranks}")
    streams = _streams(config, d_streams, n_rows, files)
    Private.of(streams.d_streams, config.n_latents, config.k, config.private, config.private_k or None)  # or an error
    machine = machine or Machine.here(device_of(config))
    _check_backend(config, machine)
    found = _outcome(config, streams, machine, dead, ranks)
    return replace(found, changes=tuple(_changes(found)))


def device_of(config: Config) -> str:
    """Where `Trainer` would train here."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _outcome(config: Config, streams: Streams, machine: Machine, dead: float, ranks: int) -> Plan:
    steps, on_gpu = _steps(config, streams), machine.device == "cuda"
    parts = parts_of(
        config, streams, threads=machine.threads, overhead=machine.overhead, steps=steps or 0, on_gpu=on_gpu, dead=dead,
        ranks=ranks,
    )  # fmt: skip
    roofs = machine.roofs
    time = {} if roofs is None else step_costs(config, streams.d_streams, roofs.faster_type, ranks)
    return Plan(
        config, streams, machine, dead, steps, tuple(parts),
        host_bytes(config, streams, machine.host_overhead, ranks) if on_gpu else None,
        mapped_bytes(config, streams.d_streams, ranks), time, (), ranks,
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
        raise ValueError(f"n_rows (--rows) must be left to the files where d_streams is, got {n_rows}")
    if files is None and not config.data:
        raise ValueError(
            "d_streams (--d-streams) must give the width of every stream, or data (--data) name their files"
        )
    with ExitStack() as opened:
        if files is None:
            try:
                files = opened.enter_context(open_files(config))
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
    if config.data and (named := streams_of(config.data)) != list(d_streams):
        raise ValueError(f"d_streams must name the streams of data, {named}, got {list(d_streams)}")
    left = None if n_rows is None else n_rows - config.validation_rows
    if left is not None and left < config.batch_size:
        raise ValueError(f"n_rows (--rows) must be at least a batch beside the held-out rows, got {n_rows}")
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
    """What saves memory or time, cheapest first; where the run does not fit, at last the most latents that do."""
    config, on_cpu = now.config, now.machine.device == "cpu"
    # what a list holds is told in any case, of other values the best alone
    tried: tuple[tuple[str, Iterable[Any], str], ...] = (
        ("lazy", [True] * (not config.lazy and bool(now.time)),
         "nothing: the same bits; pays where a batch uses few of the latents"),
        ("memory", _halves(config.memory, 2**20) if on_cpu else (),
         "smaller windows: data larger than them are shuffled less evenly"),
        ("moments", ["bfloat16"] * (config.moments == "float32"), "moments rounded to 8 bits of mantissa"),
        ("dtype", ["bfloat16"] * (config.dtype == "float32"),
         "weights are read rounded to 8 bits of mantissa; float32 masters are kept beside them"),
        ("auxk", [0] * bool(config.auxk and config.auxk_coef), "dead latents stay dead"),
        ("accumulate", (config.batch_size // rows for rows in _halves(config.micro_batch, 1)),
         "gradients of all weights, kept over the micro-batches of a step"),
        ("batch_size", _halves(config.batch_size, 64),
         "other training: more steps an epoch, and the learning rate to suit"),
    )  # fmt: skip
    for name, values, costs in tried:
        found = [change for value in values if (change := _change(now, costs, **{name: value}))]
        yield from found if isinstance(values, list) else _best(now, found)
    if not now.fits:
        steps = range(math.ceil(max(config.k, config.k_start) / 64), math.ceil(config.n_latents / 64))
        if fitting := bisect_left(steps, True, key=lambda n: not _with(now, n_latents=64 * n).fits):
            yield from filter(None, [_change(now, "a smaller dictionary", n_latents=64 * steps[fitting - 1])])


def _best(now: Plan, found: Sequence[Change]) -> Sequence[Change]:
    """The first with which the run fits and takes less, or else the first that saves about the most, if one does."""
    if fitting := [change for change in found if change.fits and change.saves > 0]:
        return fitting[:1]
    little = LITTLE * now.peak
    most = max((change.saves for change in found), default=0)
    return [change for change in found if change.saves > max(little, most - little)][:1]


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value


def _change(now: Plan, costs: str, **settings: Any) -> Change | None:
    """None where settings exclude each other, or the loader's memory is too small for the files."""
    try:
        other = _with(now, **settings)
    except ValueError:
        return None
    return Change(settings, costs, now.peak - other.peak, other.fits, other.step_seconds)


def _with(now: Plan, **settings: Any) -> Plan:
    return _outcome(replace(now.config, **settings), now.streams, now.machine, now.dead, now.ranks)
