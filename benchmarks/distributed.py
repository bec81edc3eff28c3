"""A training step of processes that share the latents, on a core each, against one process on as many threads.

Both are the same training. Beside the time by the clock, which whatever else runs changes, stands what processors
spent. What ranks exchange is counted and held against docs/distributed.md. Memory is a rank's peak in its steps, memory
that it shares included, less what it held once a tiny model had made a step.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor

from sparc_fast.distributed.layout import received_bytes
from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.planning.process_memory import forget_peak, resident

from .cases import FLOAT, SMALL, TYPES, WIDTHS, Place, Shape
from .record import Case, Record
from .steps import Ours, inputs_of, phases
from .steps import model as model_of

RANKS = 2
WIDE = Shape("N1024-L32768", 1024, 32768)
SHAPES = (WIDE, next(shape for shape in WIDTHS if shape.L == 262144), SMALL)


class Steps(NamedTuple):
    """Of a rank."""

    loss: float
    received: int
    processor_seconds: float
    memory: int


class Ranks:
    """Processes of one thread each, on a GPU each where there are GPUs, which step when they are told to."""

    def __init__(self, shape: Shape, place: Place, n: int = RANKS, dtype: str = "float32") -> None:
        context, folder = mp.get_context("spawn"), tempfile.mkdtemp()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(n):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, n, folder, shape, place, dtype, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def step(self, times: int = 1) -> float:
        """The loss of the last of so many steps."""
        return self._ask(times)[0].loss

    def received(self) -> int:
        """Bytes of one more step, of the rank that gets most."""
        return max(of_rank.received for of_rank in self._ask(1))

    def processor_seconds(self) -> float:
        """Of one more step, of all ranks together."""
        return sum(of_rank.processor_seconds for of_rank in self._ask(1))

    def memory(self) -> int:
        """Bytes of the rank that took most at its peak."""
        return max(of_rank.memory for of_rank in self._ask(1))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _ask(self, times: int) -> list[Steps]:
        for pipe in self._pipes:
            pipe.send(times)
        return [pipe.recv() for pipe in self._pipes]


def _serve(rank: int, n: int, folder: str, shape: Shape, place: Place, dtype: str, pipe: Connection) -> None:
    from sparc_fast.distributed import received, shard

    torch.set_num_threads(1)
    if place.is_gpu:
        torch.cuda.set_device(rank)
    wires = "cpu:gloo,cuda:nccl" if place.is_gpu else "gloo"
    torch.distributed.init_process_group(wires, init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    tiny = replace(SMALL, N=8)
    Ours(shard(model_of(tiny, place, place.role, dtype))).step(inputs_of(place.role, tiny, place, dtype))
    gc.collect()
    give_back_freed()
    base = resident("VmRSS")
    model = shard(model_of(shape, place, place.role, dtype))
    ours = Ours(model)
    x = inputs_of(place.role, shape, place, dtype).tensor_split(n)[rank].clone()
    gc.collect()
    give_back_freed()
    forget_peak()
    while True:
        try:
            times = pipe.recv()
        except EOFError:
            return
        before, began = received(model), process_time()
        losses = [ours.step(x) for _ in range(times)]
        loss, spent = float(losses[-1]), process_time() - began
        pipe.send(Steps(loss, sum((received(model) - before).values()), spent, resident("VmHWM") - base))


@contextmanager
def ranks(shape: Shape, place: Place, n: int = RANKS, dtype: str = "float32") -> Iterator[Ranks]:
    started = Ranks(shape, place, n, dtype)
    try:
        yield started
    finally:
        started.close()


def same_training(alone: Ours, x: Tensor, together: Ranks, most: float = 1e-5) -> str | None:
    """How three steps of ranks differ from those of one process, if they do."""
    losses = [(float(alone.step(x)), together.step()) for _ in range(3)]
    differ = max(abs(one / other - 1) for one, other in losses)
    return f"losses differ by {differ:.2g}" if differ > most else None


def _run(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    name = record.place.role
    place, threads = record.place, torch.get_num_threads()
    alone, together = f"1 process, {RANKS} threads", f"{RANKS} processes, 1 thread"
    where = ("distributed", shape.name)
    if not record.fits(3 * shape.held_bytes, *where, name, share=0.9):
        return
    with ranks(SMALL, place) as small:
        complaint = same_training(Ours(SMALL.model(place.backend)), SMALL.inputs(), small)
    if record.is_wrong(complaint, *where, together):
        return
    torch.set_num_threads(RANKS)
    try:
        with ranks(shape, place) as started:
            ours, x = Ours(shape.model(place.backend)), shape.inputs()
            runs = {together: started.step, alone: lambda: ours.step(x)}
            record.race(*where, dtype, runs, seconds, phases(shape), (together,))
            spent = [(_processor_seconds(ours, x), started.processor_seconds()) for _ in range(9 if seconds else 1)]
            received, held = started.received(), started.memory()
    finally:
        torch.set_num_threads(threads)
    ratio = median(one / ranks for one, ranks in spent)
    note = f"of one process over all ranks: {median(one for one, _ in spent) * 1e3:.0f} ms"
    record.add(*where, "processor time", value=ratio, unit="×", note=note)
    expected = received_bytes(shape.N, shape.d_streams, shape.k, RANKS)
    record.add(*where, "received by a rank", value=received, unit="B", note=f"{received / expected:.3f} of the formula")
    share = 3 * FLOAT * 2 * shape.L * shape.D / RANKS
    buffers = f"its share of weights and moments {share / 1e6:.1f} MB, all else {(held - share) / 1e6:.1f}"
    record.add(*where, "memory of a rank", value=held, unit="B", note=buffers)


def _processor_seconds(ours: Ours, x: torch.Tensor) -> float:
    began = process_time()
    ours.step(x)
    return process_time() - began


def on_devices(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    """Steps of a rank by itself, and of one on each device where there are several, beside those without ranks.

    A CPU stands in for two devices.
    """
    place = record.place
    wire, devices = ("NCCL", torch.cuda.device_count()) if place.is_gpu else ("gloo", RANKS)
    where = "step of ranks", shape.name
    if not record.fits(3 * shape.held_bytes, *where, place.role):
        return
    alone, x = Ours(model_of(shape, place, place.role, dtype)), inputs_of(place.role, shape, place, dtype)
    with ExitStack() as started:
        shared = {n: started.enter_context(ranks(shape, place, n, dtype)) for n in sorted({1, devices})}
        names = {n: f"{n} rank{'s' * (n > 1)}, {wire}" for n in shared}
        runs: dict[str, Callable[[int], object]] = {"no ranks": lambda times: _steps(alone, x, times)}
        for n, of_ranks in shared.items():
            fresh = Ours(model_of(shape, place, place.role, dtype))
            complaint = same_training(fresh, x, of_ranks, 1e-5 if dtype == "float32" else 1e-2)
            if not record.is_wrong(complaint, *where, names[n], dtype):
                runs[names[n]] = of_ranks.step
        for name, taken in _in_turns(runs, seconds).items():
            record.times(*where, name, dtype, taken=taken, work=phases(shape, dtype), role="ours")
        for n, of_ranks in shared.items():
            expected = received_bytes(shape.N, shape.d_streams, shape.k, n, weight=TYPES[dtype].itemsize)
            record.add(*where, f"received by one of {names[n]}", dtype, value=of_ranks.received(), unit="B",
                       note=f"{expected:.0f} by the formula")  # fmt: skip


def _steps(ours: Ours, x: Tensor, times: int) -> float:
    losses = [ours.step(x) for _ in range(times)]
    return float(losses[-1])


def _in_turns(runs: Mapping[str, Callable[[int], object]], seconds: float, rounds: int = 3) -> dict[str, list[float]]:
    """Seconds of a step in each round, several processes' included: by the host's clock."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    times = dict.fromkeys(runs, 1)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = perf_counter()
            run(times[name])
            took = (perf_counter() - began) / times[name]
            if turn:
                taken[name].append(took)
            else:  # the first says how many steps fit
                times[name] = max(1, min(100, int(seconds / rounds / len(runs) / took)))
    return taken


CASE = Case(_run, SHAPES)
