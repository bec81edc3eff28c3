"""The whole training step on a device: kernel by kernel, against its rivals, its memory, repeated, and in a graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparc_fast import SPARC, SparcAdam

from .cases import Place, Shape
from .gpu_record import Record
from .rivals import Dense, Lean, LeanDense
from .timing import Clock, Run, Work, equal

LR = 1e-4
MEMORY = "memory beyond weights, copies, moments, inputs"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ours:
    """`SparcAdam`, as a user trains with it, but for the check of the inputs."""

    def __init__(self, model: SPARC, lr: float = LR, **options: Any) -> None:
        self.model, self.optimizer = model, SparcAdam(model, lr, **options)

    def step(self, x: Tensor) -> Tensor:
        return self.optimizer.step(x).total

    def held(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        kept = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "master") if name in state]
        return [*self.model.parameters(), *kept]

    def result(self) -> list[Tensor]:
        return [t.detach() for t in (*self.held(), self.model.silence)]


def model(shape: Shape, place: Place, dtype: torch.dtype, **options: Any) -> SPARC:
    """Inputs are not checked, which would wait for the GPU."""
    return shape.model(place.backend, device=place.device, dtype=dtype, check_finite=False, **options)


class Autocast:
    """A rival in bfloat16 as a PyTorch user has it: float32 weights under autocast."""

    def __init__(self, trainer: Any, device: torch.device) -> None:
        self.trainer, self.device = trainer, device

    def step(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.trainer.step(x)


def trainers(shape: Shape, place: Place) -> dict[tuple[str, str], Callable[[], Any]]:
    """(name, type) -> its maker. All start from the same weights; rivals keep float32 weights and moments."""
    start = partial(model, shape, place, torch.float32)
    return {
        (place.role, "bfloat16"): lambda: Ours(model(shape, place, torch.bfloat16)),
        (place.role, "float32"): lambda: Ours(start()),
        ("Lean, dense products", "bfloat16"): lambda: LeanDense(start(), LR, torch.bfloat16),
        ("Lean, dense products", "float32"): lambda: LeanDense(start(), LR),
        ("Lean, embedding_bag", "float32"): lambda: Lean(start(), LR),
        ("Dense", "float32"): lambda: Dense(start(), LR),
        ("Dense", "bfloat16"): lambda: Autocast(Dense(start(), LR), place.device),
    }


def expected_bytes(name: str, dtype: str, shape: Shape) -> float:
    """About what a trainer takes at its peak, to know beforehand whether it fits."""
    weights = 2.0 * shape.L * shape.D
    logits = shape.S * shape.N * shape.L * (2.0 if dtype == "bfloat16" else 4.0)
    held = {"Dense": 14, "Lean, dense products": 6, "Lean, embedding_bag": 3}
    if name not in held:
        return weights * (16 if dtype == "bfloat16" else 12) + weights * 4 + 2e9  # its first weights are float32
    return weights * 24 + logits * held[name] + 2e9


def step_work(shape: Shape, dtype: str) -> tuple[Work, ...]:
    """Encoder; values; decode, loss and its gradient; weight gradients and Adam at once: one after another."""
    item, N, k, S = (2 if dtype == "bfloat16" else 4), shape.N, shape.k, shape.S
    weights, flops = shape.L * shape.D, 2.0 * N * k * shape.D
    gather, x = float(N * k * shape.D * item), float(N * shape.D * item)
    return (
        Work(2.0 * N * weights, item * weights + x),
        Work(flops, x, gather),
        Work(2 * S * flops, (2 + S) * x, gather),
        Work((1 + S) * flops, 2 * weights * (26 if item == 2 else 24), (1 + S) * gather),
    )


def compare(record: Record, clock: Clock, shape: Shape, wanted: Sequence[tuple[str, str]], seconds: float) -> None:
    """Time the trainers in turns; each is made, checked by its first losses, and left out if it does not fit."""
    place, x = record.place, shape.inputs(device=record.place.device)
    made: dict[tuple[str, str], Run] = {}
    losses: dict[tuple[str, str], list[float]] = {}
    for key in wanted:
        name, dtype = key
        if not record.has_time(seconds, "step", shape.name, *key):
            continue
        needed = expected_bytes(name, dtype, shape)
        if needed > place.free_bytes():
            record.add("step", shape.name, *key, error=f"does not fit: needs about {needed / 1e9:.0f} GB")
            continue
        with record.guard("step", shape.name, *key):
            trainer = trainers(shape, place)[key]()
            batch = x.to(TYPES[dtype]) if name == place.role else x
            losses[key] = [float(trainer.step(batch)) for _ in range(3)]
            made[key] = partial(trainer.step, batch)
    for key, complaint in disagreements(losses).items():
        record.add("step", shape.name, *key, error=f"wrong, not timed: {complaint}")
        del made[key]
    if not made:
        return
    with record.guard("step", shape.name):
        named: Mapping[str, Run] = {"/".join(key): run for key, run in made.items()}
        for label, taken in clock.steps(named, seconds).items():
            name, dtype = label.rsplit("/", 1)
            host = clock.host_seconds(named[label])
            note = f"host {host * 1e3:.2f} ms, loss after two steps {losses[name, dtype][-1]:.6g}"
            record.times("step", shape.name, name, dtype, taken, *step_work(shape, dtype), note=note)


def disagreements(losses: Mapping[tuple[str, str], list[float]]) -> dict[tuple[str, str], str]:
    """Whose first losses are not those of the others: most were written apart from each other.

    Dense adds AuxK over no dead latents, 1/32 exactly. A bfloat16 loss may be 2 % off, a float32 one 0.1 %.
    """
    plain = {key: [loss - (1 / 32 if key[0] == "Dense" else 0) for loss in own] for key, own in losses.items()}
    wide = [own for (_, dtype), own in plain.items() if dtype == "float32"] or list(plain.values())
    found = {}
    for key, own in plain.items():
        tolerance = 2e-2 if key[1] == "bfloat16" or len(wide) == len(plain) == 1 else 1e-3
        middle = sorted(other[-1] for other in wide)[len(wide) // 2]
        if not abs(own[-1] - middle) <= tolerance * abs(middle):
            found[key] = f"loss after two steps {own[-1]:.5g}, of the others {middle:.5g}"
        elif not own[-1] < own[0]:
            found[key] = f"the loss does not fall: {own}"
    return found


def memory(record: Record, shape: Shape, wanted: Sequence[tuple[str, str]]) -> None:
    """Peak bytes during two steps, less weights, narrow copies, moments and inputs."""
    place = record.place
    for name, dtype in wanted:
        where = (MEMORY, shape.name, name, dtype)
        if not record.has_time(3, *where):
            continue
        if not place.is_gpu:
            record.add(*where, error="only a GPU counts its memory")
            continue
        with record.guard(*where):
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(place.device)
            trainer = trainers(shape, place)[name, dtype]()
            x = shape.inputs(device=place.device)
            x = x.to(TYPES[dtype]) if name == place.role else x
            for _ in range(2):
                trainer.step(x)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(place.device)
            for _ in range(2):
                trainer.step(x)
            peak = torch.cuda.max_memory_allocated(place.device) - before
            record.add(*where, value=peak - sum(t.nbytes for t in (*_held(trainer), x)), unit="B")


def _held(trainer: Any) -> list[Tensor]:
    """Weights, copies and moments."""
    if isinstance(trainer, Ours):
        return trainer.held()
    module = trainer.trainer if isinstance(trainer, Autocast) else trainer
    states = [module.adam.state[p] for p in module.parameters()]
    return [*module.parameters(), *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]


def repeat(record: Record, shape: Shape, dtype: str, steps: int = 20) -> None:
    """The same steps twice, from the same weights: the same bits?"""
    where = (f"{steps} steps twice, bitwise equal", shape.name, record.place.role, dtype)
    with record.guard(*where):
        first, second = (_trained(record.place, shape, dtype, steps) for _ in range(2))
        record.add(*where, value=float(_same(first, second)), unit="held")


def _trained(place: Place, shape: Shape, dtype: str, steps: int) -> list[Tensor]:
    trainer = Ours(model(shape, place, TYPES[dtype]))
    x = shape.inputs(device=place.device).to(TYPES[dtype])
    for step in range(steps):
        trainer.step(x.roll(step, 1).roll(step, 0))
    return trainer.result()


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(equal(a, b) for a, b in zip(first, second, strict=True))


def graph(record: Record, clock: Clock, shape: Shape, dtype: str, seconds: float) -> None:
    """A step captured in a CUDA graph and replayed, against the same steps one call at a time."""
    place, where = record.place, (shape.name, record.place.role, dtype)
    if not place.is_gpu:
        record.add("step", *where, error="needs a GPU")
        return
    with record.guard("step", *where):
        x = shape.inputs(device=place.device).to(TYPES[dtype])

        def fresh() -> Ours:
            return Ours(model(shape, place, TYPES[dtype], auxk=0), capturable=True)

        captured = fresh()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                captured.step(x)
        torch.cuda.current_stream().wait_stream(side)
        steps = torch.cuda.CUDAGraph()
        with torch.cuda.graph(steps):
            captured.step(x)
        for _ in range(5):
            steps.replay()
        eager = fresh()
        for _ in range(8):
            eager.step(x)
        held = _same(captured.result(), eager.result())
        record.add("graph equals eager, bitwise", *where, value=float(held), unit="held")
        runs: dict[str, Run] = {"step, capturable": partial(eager.step, x), "step": steps.replay}
        for what, taken in clock.steps(runs, seconds).items():
            record.times(what, *where, taken, *step_work(shape, dtype))


def profile(record: Record, shape: Shape, dtype: str, steps: int = 5) -> None:
    """Where a step's time goes: a row for each kernel, those that take most first, and one for all of them."""
    place, where = record.place, (shape.name, dtype)
    with record.guard("profile", shape.name, place.role, dtype):
        needed = expected_bytes(place.role, dtype, shape)
        if needed > place.free_bytes():
            record.add(
                "profile", shape.name, place.role, dtype, error=f"does not fit: needs about {needed / 1e9:.0f} GB"
            )
            return
        trainer = Ours(model(shape, place, TYPES[dtype]))
        x = shape.inputs(device=place.device).to(TYPES[dtype])
        for _ in range(3):
            trainer.step(x)
        activity = torch.profiler.ProfilerActivity
        wait = torch.cuda.synchronize if place.is_gpu else lambda: None
        wait()
        with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * place.is_gpu]) as profiler:
            began = perf_counter()
            for _ in range(steps):
                trainer.step(x)
            wait()
            whole = (perf_counter() - began) / steps
        kernels = kernel_times(profiler.key_averages(), place.is_gpu)
        for name, (seconds, count) in kernels.items():
            note = f"{count / steps:g} a step, {seconds / steps / whole:.1%}"
            record.add(f"kernel, {place.role}", shape.name, name[:120], dtype, value=seconds / steps, note=note)
        busy = sum(seconds for seconds, _ in kernels.values()) / steps
        launches = sum(count for _, count in kernels.values()) / steps
        note = f"{launches:g} launches a step, which took {whole * 1e3:.3f} ms under the profiler"
        record.add("all kernels", where[0], place.role, dtype, value=busy, note=note)


def kernel_times(averages: Iterable[Any], on_gpu: bool) -> dict[str, tuple[float, int]]:
    """Name -> (seconds, count), the longest first; without a GPU PyTorch's operators stand in for kernels."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    taken = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in averages
        if event.device_type == wanted and not event.is_user_annotation
    }
    return dict(sorted(taken.items(), key=lambda item: -item[1][0]))
