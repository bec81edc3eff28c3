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
from dataclasses import replace

import torch

from sparc_fast.planning.process_memory import forget_peak, give_back_freed, in_own_process, resident

from .cases import FLOAT, MANY, SMALL, STEP, WIDE, WIDTHS, Shape
from .steps import trainer

SHAPES = {shape.name: shape for shape in (WIDE, *STEP, *MANY, SMALL, *WIDTHS)}


def held_bytes(shape: Shape) -> int:
    """Weights, two moments of each, and inputs: what no float32 Adam does without."""
    weights = 2 * shape.L * shape.D + shape.D + shape.S * shape.L
    return FLOAT * (3 * weights + shape.N * shape.D)


def expected_bytes(name: str, shape: Shape) -> int:
    """About what a contender takes, to know beforehand whether it fits."""
    logits, gradients = FLOAT * shape.N * shape.L, FLOAT * 2 * shape.L * shape.D
    beyond = {
        "Dense": gradients + 12 * shape.S * logits,
        "Lean": 2 * gradients + (shape.S + 1) * logits + 2 * FLOAT * shape.N * shape.k * shape.D,
        "Tuned": gradients + (shape.S + 1) * logits,
        "reference": 6 * gradients + 8 * logits,
    }
    return held_bytes(shape) + beyond.get(name, 2**28)


def extra_bytes(name: str, shape: Shape) -> int:
    """Peak bytes beyond weights, moments and inputs of a contender's step, measured in a fresh process."""
    return int(in_own_process("-m", __name__, name, shape.name, str(torch.get_num_threads())))


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
    return resident("VmHWM") - base - held_bytes(shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(_measure(arguments.name, SHAPES[arguments.shape]))
