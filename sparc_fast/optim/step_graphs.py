"""Training steps captured in CUDA graphs: what a step launches, in a single call.

A step is captured when steps of its kind have been made a few times, one call at a time, so that every kernel is
compiled and loaded. Of the same kind are steps that would launch the same: on tensors at the same places, of the same
shapes, with the same numbers. What differs from step to step is on the device: the samples, the learning rate, the
number of the step. A step of any other kind, a shorter batch say, is made one call at a time as ever, by the same code
on the same kernels: which steps were captured shows in no bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.objective import SparcLoss

MET = 3
"""Steps of a kind that are made one call at a time."""
LOOKS = 64
"""Steps in one of which the host looks whether latents are still dead."""
KEPT = 4
"""Graphs, each with the memory of a step's scratch; those met last."""


class Variables(NamedTuple):
    """What a captured step reads anew whenever it is replayed."""

    x: Tensor
    lr: Tensor
    """float64, as is `step`."""
    step: Tensor
    """The number of the step that comes; the step counts."""


class Captured(NamedTuple):
    variables: Variables
    replay: Callable[[], object]
    loss: SparcLoss


Made = Callable[[Tensor, float | Tensor, int | Tensor], SparcLoss]
"""A step of samples x, by a learning rate and the number of the step: reads nothing on the host where these are on the
device, where it is counted too."""


class StepGraphs:
    """The graphs of one optimizer."""

    def __init__(self) -> None:
        self._met: dict[Hashable, int] = {}
        self._kept: dict[Hashable, Captured] = {}
        self._held: dict[int, tuple[float, int]] = {}  # what lr and step hold, by the graph
        self.inputs: Tensor | None = None
        """Where the graph that was replayed last reads samples: whoever writes the next ones there spares a copy."""

    def make(self, kind: Hashable, step: Made, x: Tensor, lr: float | Tensor, number: int) -> tuple[SparcLoss, bool]:
        """The step's loss, and whether it was replayed."""
        captured = self._kept.get(kind)
        if captured is None and self._is_due(kind):
            captured = self._capture(kind, step, x, lr)
        if captured is None:
            return step(x, lr, number), False
        variables, replay, loss = captured
        held = self._held.get(id(variables), (None, None))
        if not isinstance(lr, Tensor) and held[0] != lr:
            variables.lr.fill_(lr)
        if held[1] != number:
            variables.step.fill_(number)
        self._held[id(variables)] = (0.0 if isinstance(lr, Tensor) else lr), number + 1
        if x.data_ptr() != variables.x.data_ptr():
            variables.x.copy_(x)
        self.inputs = variables.x
        replay()
        return copied(loss), True

    def _is_due(self, kind: Hashable) -> bool:
        met = self._met.pop(kind, 0) + 1
        self._met[kind] = met
        if len(self._met) > 4 * KEPT:
            del self._met[next(iter(self._met))]
        return met > MET

    def _capture(self, kind: Hashable, step: Made, x: Tensor, lr: float | Tensor) -> Captured | None:
        if len(self._kept) == KEPT:  # first, so that its memory is there for the next
            oldest = next(iter(self._kept))
            self._held.pop(id(self._kept.pop(oldest).variables), None)
        zero = torch.zeros(2, dtype=torch.float64, device=x.device)
        variables = Variables(torch.empty_like(x), zero[0], zero[1])
        rate = lr if isinstance(lr, Tensor) else variables.lr
        try:
            replay, loss = capture(lambda: step(variables.x, rate, variables.step), x.device)
        except RuntimeError as error:
            self._met[kind] = -(2**62)
            warnings.warn(
                f"a training step could not be captured in a CUDA graph, and is slower: {error}", stacklevel=2
            )
            return None
        self._kept[kind] = Captured(variables, replay, loss)
        return self._kept[kind]


def capture(function: Callable[[], SparcLoss], device: torch.device) -> tuple[Callable[[], object], SparcLoss]:
    """(what replays the launches of this function, the results they write)."""
    graph = torch.cuda.CUDAGraph()
    # other threads may go on with their own work on the device
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs, and nobody is making one."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def copied(loss: SparcLoss) -> SparcLoss:
    """Results that the next replay leaves alone; what lies in one piece of memory is copied at once."""
    copies: dict[int, torch.UntypedStorage] = {}

    def copy(part: Tensor) -> Tensor:
        storage = part.untyped_storage()
        there = copies.get(storage.data_ptr())
        if there is None:
            whole = torch.empty(0, dtype=torch.uint8, device=part.device).set_(storage)
            there = copies[storage.data_ptr()] = whole.clone().untyped_storage()
        mine = torch.empty(0, dtype=part.dtype, device=part.device)
        return mine.set_(there, part.storage_offset(), part.shape, part.stride())

    return loss._replace(**{name: copy(part) for name, part in loss._asdict().items() if part is not None})


class Quiet:
    """For how many samples yet no latent can be dead: known without asking the device, for most of a run."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._left, self._looked = -1, LOOKS

    def holds(self, silence: Tensor, dead_after: int) -> bool:
        """Whether surely no latent is dead; waits for the device where that is in question, or others wrote `silence`.

        While some are, it is asked again in one of LOOKS steps.
        """
        is_known = self._seen == (silence.data_ptr(), silence._version)
        if not is_known or (self._left < 0 and self._looked >= LOOKS):
            self._left = dead_after - int(silence.max())
            self._looked = 0
        return self._left >= 0

    def note(self, silence: Tensor, samples: int) -> None:
        """After a step, in which the latents of so many samples have been counted."""
        if self._left >= 0:
            self._left, self._looked = self._left - samples, LOOKS
        self._looked += 1
        self._seen = silence.data_ptr(), silence._version
