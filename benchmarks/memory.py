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
import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import sparc_fast

from .cases import FLOAT, MANY, SMALL, STEP, WIDE, Shape
from .steps import trainer

SHAPES = {shape.name: shape for shape in (WIDE, *STEP, *MANY, SMALL)}


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


def available_bytes() -> int | None:
    """What the system could still give; None where it does not say."""
    lines = _lines("/proc/meminfo")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def extra_bytes(name: str, shape: Shape) -> int:
    """Peak bytes beyond weights, moments and inputs of a contender's step, measured in a fresh process."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", __name__, name, shape.name, str(torch.get_num_threads())]
    # from the installed package's own folder: `-m` puts the current one first, and a checkout there would shadow it
    folder = Path(sparc_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {name} at {shape.name} could not be measured: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


def _measure(name: str, shape: Shape) -> int:
    tiny = replace(SMALL, N=8)
    warm = trainer(name, tiny)
    warm.step(tiny.inputs())
    del warm
    _trim()
    base = _resident("VmRSS")
    contender, x = trainer(name, shape), shape.inputs()
    _trim()
    _forget_peak()
    for _ in range(2):
        contender.step(x)
    return _resident("VmHWM") - base - held_bytes(shape)


def _resident(field: str) -> int:
    """VmRSS, now, or VmHWM, its peak, in bytes; elsewhere than on Linux the peak of the whole process."""
    for line in _lines("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _trim() -> None:
    """Give freed memory back, so that it is not mistaken for memory in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(_measure(arguments.name, SHAPES[arguments.shape]))
