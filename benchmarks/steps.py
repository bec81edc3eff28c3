"""The whole training step on any device: against its rivals, kernel by kernel, repeated, and in a graph.

Also forward and backward of one stream against EagerSAE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from sparc_fast import SPARC, SparcAdam
from sparc_fast.planning.roofline import Cost
from sparc_fast.planning.time import step_costs
from sparc_fast.training.config import Config

from .cases import FLOAT, ON_GPU, SINGLE, SMALL, SMALL_SINGLE, STEP, TYPES, C, Place, Shape, nested_sizes
from .figures import GRAPH
from .operators import disagreement
from .record import Case, Record
from .rivals import Dense, EagerSAE, Lean, LeanDense, Tuned
from .timing import Run, equal

CPU = Place(torch.device("cpu"), {"auto": "auto"})
CPU_RIVALS = ("Dense", "Lean", "Tuned")
GPU_RIVALS = (
    ("Lean, dense products", "bfloat16"), ("Lean, dense products", "float32"), ("Lean", "float32"),
    ("Dense", "float32"), ("Dense", "bfloat16"),
)  # fmt: skip
"""In bfloat16 as a PyTorch user has it: over float32 weights and moments."""


PRODUCT = "x @ W_enc.T"
"""A yardstick on a CPU: what the encoder cannot do without in float32."""


class Trainer(Protocol):
    """What the contenders of a step have in common; all start from the same weights."""

    adam: torch.optim.Optimizer

    def step(self, x: Tensor) -> Tensor: ...

    def weights(self) -> tuple[Tensor, Tensor]: ...


class Ours:
    """`SparcAdam`, as a user trains with it, perhaps in several micro-batches."""

    def __init__(self, model: SPARC, parts: int = 1, **options: Any) -> None:
        self.model, self.parts = model, parts
        self.adam = SparcAdam(model, **options)

    def step(self, x: Tensor) -> Tensor:
        return self.adam.step(x.tensor_split(self.parts) if self.parts > 1 else x).total

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.model.W_enc.data, self.model.W_dec.data


def model(shape: Shape, place: Place, name: str, dtype: str, **options: Any) -> SPARC:
    """On a GPU inputs are not checked, which would wait for it."""
    options = {"device": place.device, "dtype": TYPES[dtype], **options}
    return shape.model(place.ours.get(name, name), **options, **({"check_finite": False} if place.as_gpu else {}))


def trainer(name: str, shape: Shape, place: Place = CPU, dtype: str = "float32", auxk: bool = True) -> Trainer:
    """A rival, or ours of that label or backend, perhaps ", replay" or in ", 8 parts".

    No latent is dead here: only Dense then still computes AuxK.
    """
    start = partial(model, shape, place, place.role, "float32")
    if name == "Dense":
        return Dense(start(), auxk_coef=1 / 32 if auxk else 0.0, autocast=dtype == "bfloat16")
    if name == "Lean, dense products":
        return LeanDense(start(), compute=TYPES[dtype])
    if name in ("Lean", "Tuned"):
        return {"Lean": Lean, "Tuned": Tuned}[name](start())
    name, _, how = name.partition(", ")
    parts, split, _ = how.partition(" parts")
    lazy = "replay" if how and not split else None
    return Ours(model(shape, place, name, dtype), parts=int(parts) if split else 1, lazy=lazy)


def is_ours(name: str, place: Place) -> bool:
    return name.partition(", ")[0] in place.ours


def inputs_of(name: str, shape: Shape, place: Place, dtype: str) -> Tensor:
    """Rivals keep float32 inputs."""
    return shape.inputs(device=place.device).to(TYPES[dtype] if is_ours(name, place) else torch.float32)


def held(contender: Trainer) -> Iterator[Tensor]:
    """Weights, copies and moments."""
    for group in contender.adam.param_groups:
        for p in group["params"]:
            state = contender.adam.state[p]
            yield p.detach()
            yield from (state[name] for name in ("exp_avg", "exp_avg_sq", "master") if name in state)


def check_step(name: str, place: Place) -> str | None:
    """How a first step without AuxK differs from the reference's in loss and in the move of the weights, if it does."""
    start = [W.detach().clone() for W in (SMALL.model().W_enc, SMALL.model().W_dec)]

    def first_step(name: str) -> tuple[Tensor, Tensor]:
        contender = trainer(name, SMALL, place, auxk=False)
        loss = contender.step(SMALL.inputs())
        return loss, torch.stack([W - W0 for W, W0 in zip(contender.weights(), start, strict=True)])

    (loss, move), (want_loss, want_move) = first_step(name), first_step("reference")
    # of the norm, not of each entry: Adam's first step keeps only a gradient's sign, and a sum near 0 has either
    difference = float((move - want_move).norm() / want_move.norm())
    return disagreement(loss, want_loss) or (None if difference < 1e-2 else f"first update differs by {difference:.2g}")


def phases(shape: Shape, dtype: str = "float32", moments: str = "float32") -> list[Cost]:
    """What a step cannot do without, counted as `sparc-fast plan` counts."""
    config = Config(n_latents=shape.L, k=shape.k, batch_size=shape.N, steps=1, auxk=0, dtype=dtype, moments=moments)
    d_streams = {f"stream{s}": width for s, width in enumerate(shape.d_streams)}
    return [replace(cost, dtype=dtype) for cost in step_costs(config, d_streams).values()]


def contenders(place: Place, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """(name, type) of ours and of the rivals of a device."""
    rivals = GPU_RIVALS if place.as_gpu else [(name, "float32") for name in CPU_RIVALS]
    return [(name, dtype) for dtype in dtypes for name in place.ours] + [key for key in rivals if key[1] in dtypes]


def expected_bytes(name: str, shape: Shape, dtype: str = "float32", on_gpu: bool = False) -> float:
    """About what a contender takes at its peak, to know beforehand whether it fits."""
    weights, logits = 2 * shape.L * shape.D, shape.N * shape.L * (2 if dtype == "bfloat16" else FLOAT)
    gradients, S = FLOAT * weights, shape.S
    beyond = {
        "Dense": gradients + 14 * S * logits,
        "Lean, dense products": 2 * gradients + 6 * S * logits,
        "Lean": 2 * gradients + (S + 1) * logits + 2 * FLOAT * shape.N * shape.k * shape.D,
        "Tuned": gradients + (S + 1) * logits,
        "reference": 6 * gradients + 8 * logits,
    }
    own = 2 * FLOAT * weights if dtype == "bfloat16" else 0  # copies, and the float32 weights they are made of
    return shape.held_bytes + beyond.get(name, own) + (2e9 if on_gpu else 2**28)


def compare(record: Record, shape: Shape, wanted: Sequence[tuple[str, str]], seconds: float) -> None:
    """Time the trainers in turns; each is made, checked, and left out if it does not fit.

    On a CPU its first update of small weights is checked; a GPU, which would have to compile for them, compares losses.
    """
    place = record.place
    made: dict[tuple[str, str], Run] = {}
    losses: dict[tuple[str, str], list[float]] = {}
    for key in wanted:
        where, (name, dtype) = ("step", shape.name, *key), key
        needed = expected_bytes(name, shape, dtype, place.as_gpu)
        if not (record.has_time(seconds, *where) and record.fits(needed, *where)):
            continue
        with record.guard(*where):
            if not place.as_gpu and record.is_wrong(check_step(name, place), *where):
                continue
            contender, x = trainer(name, shape, place, dtype), inputs_of(name, shape, place, dtype)
            if place.as_gpu:
                losses[key] = [float(contender.step(x)) for _ in range(3)]
            made[key] = partial(contender.step, x)
    for key, complaint in disagreements(losses).items():
        record.is_wrong(complaint, "step", shape.name, *key)
        del made[key]
    if not made:
        return
    with record.guard("step", shape.name):
        if not place.as_gpu:
            x, W = shape.inputs(), shape.model().W_enc.data
            made[PRODUCT, "float32"] = lambda: x @ W.T
        named: Mapping[str, Run] = {"/".join(key): run for key, run in made.items()}
        for (key, run), taken in zip(made.items(), record.clock.steps(named, seconds).values(), strict=True):
            name, dtype = key
            role = "ours" if is_ours(name, place) else "yardstick" if name == PRODUCT else "baseline"
            note = ""
            if place.as_gpu:
                host = record.clock.host_seconds(run)
                note = f"host {host * 1e3:.2f} ms, loss after two steps {losses[key][-1]:.6g}"
            work = phases(shape, dtype)
            record.times("step", shape.name, name, dtype, taken=taken, work=work, note=note, role=role)


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


def repeat(record: Record, shape: Shape, dtype: str, steps: int = 20) -> None:
    """The same steps twice, from the same weights: the same bits?"""
    where = (f"{steps} steps twice, bitwise equal", shape.name, record.place.role, dtype)
    with record.guard(*where):
        first, second = (_trained(record.place, shape, dtype, steps) for _ in range(2))
        record.add(*where, value=float(_same(first, second)), unit="held")


def _trained(place: Place, shape: Shape, dtype: str, steps: int) -> Ours:
    ours = Ours(model(shape, place, place.role, dtype))
    x = inputs_of(place.role, shape, place, dtype)
    for step in range(steps):
        ours.step(x.roll(step, 1).roll(step, 0))
    return ours


def _same(first: Ours, second: Ours) -> bool:
    results = ([*held(ours), ours.model.silence] for ours in (first, second))
    return all(equal(a, b) for a, b in zip(*results, strict=True))


def graph(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    """A step captured in a CUDA graph and replayed, against the same steps one call at a time."""
    place, where = record.place, (shape.name, record.place.role, dtype)
    if not place.is_gpu:
        record.add("step", *where, error="needs a GPU")
        return
    with record.guard("step", *where):
        x = inputs_of(place.role, shape, place, dtype)
        captured, eager = (Ours(model(shape, place, place.role, dtype, auxk=0), capturable=True) for _ in range(2))
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
        for _ in range(8):
            eager.step(x)
        record.add(GRAPH, *where, value=float(_same(captured, eager)), unit="held")
        runs: dict[str, Run] = {"step, capturable": partial(eager.step, x), "step": steps.replay}
        for what, taken in record.clock.steps(runs, seconds).items():
            record.times(what, *where, taken=taken, work=phases(shape, dtype))


def profile(record: Record, shape: Shape, dtype: str, steps: int = 5) -> None:
    """Where a step's time goes: a row for each kernel, those that take most first, and one for all of them."""
    place, where = record.place, ("profile", shape.name, record.place.role, dtype)
    if not record.fits(expected_bytes(place.role, shape, dtype, place.as_gpu), *where):
        return
    with record.guard(*where):
        ours, x = Ours(model(shape, place, place.role, dtype)), inputs_of(place.role, shape, place, dtype)
        for _ in range(3):
            ours.step(x)
        activity = torch.profiler.ProfilerActivity
        wait = torch.cuda.synchronize if place.is_gpu else lambda: None
        wait()
        with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * place.is_gpu]) as profiler:
            began = perf_counter()
            for _ in range(steps):
                ours.step(x)
            wait()
            whole = (perf_counter() - began) / steps
        kernels = kernel_times(profiler.key_averages(), place.is_gpu)
        for name, (seconds, count) in kernels.items():
            note = f"{count / steps:g} a step, {seconds / steps / whole:.1%}"
            record.add(f"kernel, {place.role}", shape.name, name[:120], dtype, value=seconds / steps, note=note)
        busy = sum(seconds for seconds, _ in kernels.values()) / steps
        launches = sum(count for _, count in kernels.values()) / steps
        note = f"{launches:g} launches a step, which took {whole * 1e3:.3f} ms under the profiler"
        record.add("all kernels", *where[1:], value=busy, note=note)


def kernel_times(averages: Iterable[Any], on_gpu: bool) -> dict[str, tuple[float, int]]:
    """Name -> (seconds, count), the longest first; without a GPU PyTorch's operators stand in for kernels."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    taken = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in averages
        if event.device_type == wanted and not event.is_user_annotation
    }
    return dict(sorted(taken.items(), key=lambda item: -item[1][0]))


def _sae(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    x, where = shape.inputs(), ("sae", shape.name)
    want = _forward_backward(shape.model("reference"), x)
    own = {name: shape.model(backend) for name, backend in record.place.ours.items()}
    runs: dict[str, Run] = {}
    for name, contender in {**own, "EagerSAE": EagerSAE(shape.model())}.items():
        run = partial(_forward_backward, contender, x)
        if not record.is_wrong(disagreement(run(), want), *where, name, dtype):
            runs[name] = run
    N, L, D, k = shape.N, shape.L, shape.D, shape.k
    work = (
        Cost(2 * N * L * D, FLOAT * (L * D + N * D)),
        Cost(10 * N * k * D, FLOAT * (min(N * k, L) * D + 3 * N * D + 2 * L * D)),
    )
    record.race(*where, dtype, runs, seconds, work)


def _forward_backward(model: SPARC | EagerSAE, x: Tensor) -> tuple[Tensor | None, ...]:
    """The loss and the gradients of both weight matrices."""
    model.zero_grad()
    loss = model.loss(x)
    total = loss if isinstance(loss, Tensor) else loss.total
    total.backward()
    return total.detach(), model.W_enc.grad, model.W_dec.grad


def _step(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    compare(record, shape, contenders(record.place, [dtype]), seconds)


def rules(shape: Shape) -> dict[str, tuple[Shape, dict[str, Any]]]:
    """Ways to choose latents, and what is minimised of them: a shape in which as many fire, and options of a model."""
    own, private = max(1, shape.k // 8), {f"stream{s}": shape.L // 16 for s in range(shape.S)}
    return {
        "global": (shape, {}),
        "batch": (shape, {"selection": "batch"}),
        "jumprelu": (shape, {"selection": "jumprelu"}),
        "4 nested dictionaries": (shape, {"matryoshka": nested_sizes(shape.L)}),
        "an eighth private": (replace(shape, k=shape.k - own), {"private": private, "private_k": own}),
    }


def _rules(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    """A step by each rule, against one under global selection; each must lose what the reference does.

    The learning rate is 0: a step does all its work, and every rule keeps the L0 that it begins with.
    """
    place, runs = record.place, {}
    for rule, (sized, options) in rules(shape).items():
        small, of_small = rules(SMALL)[rule]
        losses = [_losses(Ours(model(small, place, name, "float32", **of_small))) for name in (place.role, "reference")]
        if record.is_wrong(disagreement(*losses), "rules", shape.name, rule):
            continue
        ours = Ours(model(sized, place, place.role, dtype, **options), lr=0.0)
        runs[rule] = partial(ours.step, inputs_of(place.role, shape, place, dtype))
    record.race("rules", shape.name, dtype, runs, seconds, phases(shape, dtype), tuple(runs))


def _losses(ours: Ours) -> Tensor:
    x = SMALL.inputs(device=ours.model.W_enc.device)
    return torch.stack([ours.step(x) for _ in range(3)])


CASES = {
    "rules": Case(_rules, (*STEP, SMALL), (*ON_GPU,)),
    "step": Case(_step, (*STEP, SMALL), (*ON_GPU, C)),
    "sae": Case(_sae, (SINGLE, SMALL_SINGLE)),
}
