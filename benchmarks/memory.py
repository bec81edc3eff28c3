"""Peak memory of a training step beyond weights, moments and inputs, taken in a process of its own.

The process first trains a tiny model, so that libraries and threads are there; what it then holds is the base.
It builds the model and the inputs, forgets the peak so far, and takes two steps. The answer is the highest
resident memory during them, less the base, less the bytes of weights, two moments each, and inputs. Gradients,
logits, codes and every scratch that outlives a step count.

    python -m benchmarks.memory cpu N65536-L8192 2               # bytes of a contender, a shape, 2 threads
    python -m benchmarks.memory "cpu, 16 parts" N65536-L8192 2
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.planning.process_memory import forget_peak, in_own_process, resident

from .cases import MANY, ON_GPU, SMALL, STEP, WIDE, WIDTHS, Place, Shape
from .record import Case, Record
from .steps import CPU_RIVALS, contenders, expected_bytes, held, inputs_of, is_ours, trainer

SHAPES = {shape.name: shape for shape in (WIDE, *STEP, *MANY, SMALL, *WIDTHS)}


def extra_bytes(name: str, shape: Shape) -> int:
    """Peak bytes beyond weights, moments and inputs of a contender's step, measured in a fresh process."""
    return int(in_own_process("-m", __name__, name, shape.name, str(torch.get_num_threads())))


def peak_on_gpu(name: str, dtype: str, shape: Shape, place: Place) -> int:
    """The same by the GPU's own count, in this process."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(place.device)
    contender, x = trainer(name, shape, place, dtype), inputs_of(name, shape, place, dtype)
    for _ in range(2):
        contender.step(x)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(place.device)
    for _ in range(2):
        contender.step(x)
    peak = torch.cuda.max_memory_allocated(place.device) - before
    return peak - sum(t.nbytes for t in (*held(contender), x))


def measure(record: Record, shape: Shape, wanted: Sequence[tuple[str, str]]) -> None:
    """A row for each contender in each type."""
    place = record.place
    for name, dtype in wanted:
        where = ("memory", shape.name, name, dtype)
        if place.stands_in:
            record.add(*where, error="only a GPU counts its memory")
        elif record.has_time(3, *where) and record.fits(expected_bytes(name, shape, dtype, place.as_gpu), *where):
            with record.guard(*where):
                extra = peak_on_gpu(name, dtype, shape, place) if place.is_gpu else extra_bytes(name, shape)
                role = "ours" if is_ours(name, place) else "baseline"
                record.add(*where, value=extra, unit="B", note="beyond weights, moments and inputs", role=role)


def _run(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    place = record.place
    own = list(place.ours)
    if place.as_gpu:
        measure(record, shape, contenders(place, [dtype]))
    else:
        measure(record, shape, [(name, dtype) for name in (*own, f"{own[0]}, replay", *CPU_RIVALS)])


CASE = Case(_run, (WIDE, SMALL), ON_GPU)


def _measure(name: str, shape: Shape) -> int:
    tiny = replace(SMALL, N=8)
    warm = trainer(name, tiny)
    warm.step(tiny.inputs())
    del warm
    give_back_freed()
    base = resident("VmRSS")
    contender, x = trainer(name, shape), shape.inputs()
    give_back_freed()
    forget_peak()
    for _ in range(2):
        contender.step(x)
    return resident("VmHWM") - base - shape.held_bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(_measure(arguments.name, SHAPES[arguments.shape]))
