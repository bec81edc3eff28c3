"""A training step of processes that share the latents, on a core each, against one process on as many threads.

Both are the same training. Beside the time by the clock, which whatever else runs changes, stands what processors
spent. What ranks exchange is counted and held against docs/distributed.md. Memory is a rank's peak in its steps, memory
that it shares included, less what it held once a tiny model had made a step.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from time import process_time

import torch
import torch.multiprocessing as mp

from sparc_fast.distributed.bytes import received_bytes
from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.planning.process_memory import forget_peak, resident

from .cases import FLOAT, SMALL, WIDTHS, Shape
from .record import Case, Record
from .steps import Ours, phases

RANKS = 2
WIDE = Shape("N1024-L32768", 1024, 32768)
SHAPES = (WIDE, next(shape for shape in WIDTHS if shape.L == 262144), SMALL)


class Ranks:
    """Processes of one thread each, which step when they are told to."""

    def __init__(self, shape: Shape, backend: str) -> None:
        context, folder = mp.get_context("spawn"), tempfile.mkdtemp()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder, shape, backend, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def step(self) -> float:
        """The loss."""
        return float(self._ask("step")[0])

    def received(self) -> int:
        """Bytes of one more step, of the rank that gets most."""
        return max(int(of_rank) for of_rank in self._ask("received"))

    def processor_seconds(self) -> float:
        """Of one more step, of all ranks together."""
        return sum(self._ask("processor"))

    def memory(self) -> int:
        """Bytes of the rank that took most at its peak."""
        return max(int(of_rank) for of_rank in self._ask("memory"))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _ask(self, what: str) -> list[float]:
        for pipe in self._pipes:
            pipe.send(what)
        return [pipe.recv() for pipe in self._pipes]


def _serve(rank: int, folder: str, shape: Shape, backend: str, pipe: Connection) -> None:
    from sparc_fast.distributed import received, shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    tiny = replace(SMALL, N=8)
    Ours(shard(tiny.model(backend))).step(tiny.inputs())
    gc.collect()
    give_back_freed()
    base = resident("VmRSS")
    model = shard(shape.model(device="meta"))  # each draws its own
    model.backend = backend
    ours = Ours(model)
    x = shape.inputs().tensor_split(RANKS)[rank].clone()
    give_back_freed()
    forget_peak()
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        before, began = received(model), process_time()
        loss = float(ours.step(x))
        found = {"step": loss, "processor": process_time() - began, "memory": resident("VmHWM") - base}
        pipe.send(found[asked] if asked in found else sum((received(model) - before).values()))


@contextmanager
def ranks(shape: Shape, backend: str) -> Iterator[Ranks]:
    started = Ranks(shape, backend)
    try:
        yield started
    finally:
        started.close()


def same_training(backend: str) -> str | None:
    """How three steps of ranks differ from those of one process, if they do."""
    alone, x = Ours(SMALL.model(backend)), SMALL.inputs()
    with ranks(SMALL, backend) as together:
        losses = [(float(alone.step(x)), together.step()) for _ in range(3)]
    differ = max(abs(one / other - 1) for one, other in losses)
    return f"losses differ by {differ:.2g}" if differ > 1e-5 else None


def _run(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    name = record.place.role
    backend, threads = record.place.backend, torch.get_num_threads()
    alone, together = f"1 process, {RANKS} threads", f"{RANKS} processes, 1 thread"
    where = ("distributed", shape.name)
    if not record.fits(3 * shape.held_bytes, *where, name, share=0.9):
        return
    if complaint := same_training(backend):
        record.add(*where, together, error=f"WRONG, not timed: {complaint}")
        return
    torch.set_num_threads(RANKS)
    try:
        with ranks(shape, backend) as started:
            ours, x = Ours(shape.model(backend)), shape.inputs()
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


CASE = Case(_run, SHAPES)
