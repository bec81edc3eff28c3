"""SparcAdam(moments="bfloat16") against SparcAdam: 8 bytes of moments a weight that are not read and written."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .cases import FLOAT, SMALL, STEP, Case, Cost, Shape
from .steps import Ours, Whole, step_phases

STEPS = 24


def same_training(backend: str) -> str | None:
    """How training with bfloat16 moments differs from that with float32's by more than their rounding, if it does."""
    exact, narrow = (Ours(SMALL.model(backend), moments=moments) for moments in ("float32", "bfloat16"))
    x = SMALL.inputs()
    for _ in range(STEPS):
        losses = [float(trainer.step(x)) for trainer in (exact, narrow)]
    difference = abs(losses[1] / losses[0] - 1)
    return f"loss of step {STEPS} differs by {difference:.1%} from float32's" if difference > 0.01 else None


def case(shape: Shape, names: Sequence[str]) -> Case:
    x = shape.inputs()
    wrong, contenders, ours = {}, {}, []
    for name in names:
        narrow = f"{name}, bfloat16 moments"
        if complaint := same_training(name):
            wrong[narrow] = complaint
            continue
        for label, moments in ((narrow, "bfloat16"), (f"{name}, float32 moments", "float32")):
            contenders[label] = partial(Ours(shape.model(name), moments=moments).step, x)
        ours.append(narrow)
    *phases, update = step_phases(shape)
    # of 2 matrices 2 moments each, read and written, half
    update = Cost(update.flops, update.bytes - 2 * 2 * 2 * shape.L * shape.D * FLOAT / 2)
    return Case("moments", shape, contenders, tuple(ours), (*phases, update), wrong=wrong)


MOMENTS = {"moments": Whole("moments", (*STEP, SMALL), (), case)}
