"""The options of SparcAdam against the plain one: the same training, in less memory traffic.

`lazy="replay"` leaves rows alone that no sample touches; `moments="bfloat16"` moves 8 bytes a weight less.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Literal

import torch

from sparc_fast.planning.roofline import Cost

from .cases import FLOAT, SMALL, STEP, WIDE, Shape
from .record import Case, Record
from .steps import Ours, phases
from .timing import Run

BATCHES = 12
SKEW = 1.0  # of the latents' biases, in standard deviations of a score
STEPS = 24
Lazy = Literal["replay"] | None
LAZY: tuple[Lazy, Lazy] = ("replay", None)


def training(shape: Shape, backend: str, skewed: bool, lazy: Lazy) -> Ours:
    """`skewed` gives some latents far more samples than others."""
    model = shape.model(backend)
    if skewed:
        torch.manual_seed(1)
        # a row of W_enc has uniform entries: a stream of unit norm scores with a variance of 1 / (3 D_s)
        variance = sum(1 / (3 * width) for width in shape.d_streams)
        torch.nn.init.normal_(model.latent_bias, std=SKEW * (variance / shape.S) ** 0.5)
    return Ours(model, lazy=lazy)


def stepping(ours: Ours, shape: Shape) -> Run:
    """Steps on batches that come round."""
    batches = cycle(torch.stack([shape.inputs(seed) for seed in range(1, BATCHES + 1)]))
    return lambda: ours.step(next(batches))


def same_training(backend: str, skewed: bool) -> str | None:
    """How replay differs from the dense run after some steps, if it does."""
    both = [training(SMALL, backend, skewed, lazy) for lazy in LAZY]
    for run in [stepping(ours, SMALL) for ours in both]:
        for _ in range(2 * BATCHES):
            run()
    lazy, dense = (ours.model.state_dict() for ours in both)
    differ = [name for name, weights in dense.items() if not torch.equal(lazy[name], weights)]
    return f"{', '.join(differ)} differ from the dense run's" if differ else None


def _replay(op: str, record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    runs: dict[str, Run] = {}
    skewed = op == "replay-skewed"
    for name, backend in record.place.ours.items():
        if not record.fits(2 * shape.held_bytes, op, shape.name, name, share=0.9):
            continue
        if record.is_wrong(same_training(backend, skewed), op, shape.name, name):
            continue
        for label, lazy in zip((name, f"{name}, every row"), LAZY, strict=True):
            runs[label] = stepping(training(shape, backend, skewed, lazy), shape)
    weights = FLOAT * shape.L * shape.D
    record.race(
        op, shape.name, dtype, runs, seconds, (Cost(2 * shape.N * shape.L * shape.D, weights), Cost(0, 6 * weights))
    )


def same_losses(backend: str) -> str | None:
    """How training with bfloat16 moments differs from that with float32's by more than their rounding, if it does."""
    exact, narrow = (Ours(SMALL.model(backend), moments=moments) for moments in ("float32", "bfloat16"))
    x = SMALL.inputs()
    for _ in range(STEPS):
        losses = [float(trainer.step(x)) for trainer in (exact, narrow)]
    difference = abs(losses[1] / losses[0] - 1)
    return f"loss of step {STEPS} differs by {difference:.1%} from float32's" if difference > 0.01 else None


def _moments(record: Record, shape: Shape, dtype: str, seconds: float) -> None:
    x = shape.inputs()
    runs: dict[str, Run] = {}
    for name, backend in record.place.ours.items():
        if record.is_wrong(same_losses(backend), "moments", shape.name, f"{name}, bfloat16 moments"):
            continue
        for moments in ("bfloat16", "float32"):
            runs[f"{name}, {moments} moments"] = partial(Ours(shape.model(backend), moments=moments).step, x)
    ours = tuple(name for name in runs if "bfloat16" in name)
    record.race("moments", shape.name, dtype, runs, seconds, phases(shape, moments="bfloat16"), ours)


CASES = {
    "replay": Case(partial(_replay, "replay"), (WIDE, SMALL)),
    "replay-skewed": Case(partial(_replay, "replay-skewed"), (WIDE, SMALL)),
    "moments": Case(_moments, (*STEP, SMALL)),
}
