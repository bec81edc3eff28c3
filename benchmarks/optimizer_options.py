"""The options of SparcAdam against the plain one: the same training, in less memory traffic.

`lazy="replay"` leaves rows alone that no sample touches; `moments="bfloat16"` moves 8 bytes a weight less.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from sparc_fast import SparcAdam
from sparc_fast.planning.process_memory import available_bytes
from sparc_fast.planning.roofline import Cost

from . import memory
from .cases import FLOAT, SMALL, STEP, WIDE, Case, Shape
from .steps import Ours, Whole, step_phases

BATCHES = 12
SKEW = 1.0  # of the latents' biases, in standard deviations of a score


class Training:
    """Steps on batches that come round; `skewed` gives some latents far more samples than others."""

    def __init__(self, shape: Shape, backend: str, lazy: bool, skewed: bool) -> None:
        self.model = shape.model(backend)
        if skewed:
            torch.manual_seed(1)
            # a row of W_enc has uniform entries: a stream of unit norm scores with a variance of 1 / (3 D_s)
            variance = sum(1 / (3 * width) for width in shape.d_streams)
            torch.nn.init.normal_(self.model.latent_bias, std=SKEW * (variance / shape.S) ** 0.5)
        self.optimizer = SparcAdam(self.model, lazy="replay" if lazy else None)
        self.batches = cycle(torch.stack([shape.inputs(seed) for seed in range(1, BATCHES + 1)]))

    def step(self) -> Tensor:
        return self.optimizer.step(next(self.batches)).total


def same_training(backend: str, skewed: bool) -> str | None:
    """How replay differs from the dense run after some steps, if it does."""
    dense, lazy = (Training(SMALL, backend, lazy, skewed) for lazy in (False, True))
    for _ in range(2 * BATCHES):
        dense.step(), lazy.step()
    states = dense.model.state_dict(), lazy.model.state_dict()
    differ = [name for name, weights in states[0].items() if not torch.equal(states[1][name], weights)]
    return f"{', '.join(differ)} differ from the dense run's" if differ else None


def _replay_case(shape: Shape, names: Sequence[str], skewed: bool) -> Case:
    needed, free = 2 * memory.held_bytes(shape), available_bytes()
    if free is not None and needed > 0.9 * free:
        raise MemoryError(f"two models need {needed / 1e9:.0f} GB of {free / 1e9:.0f} free")
    wrong, contenders = {}, {}
    for name in names:
        if complaint := same_training(name, skewed):
            wrong[name] = complaint
        else:
            contenders[name] = Training(shape, name, True, skewed).step
            contenders[f"{name}, every row"] = Training(shape, name, False, skewed).step
    weights = FLOAT * shape.L * shape.D
    phases = (Cost(2 * shape.N * shape.L * shape.D, weights), Cost(0, 6 * weights))
    op = "replay-skewed" if skewed else "replay"
    return Case(op, shape, contenders, tuple(names), phases, wrong=wrong)


STEPS = 24


def same_losses(backend: str) -> str | None:
    """How training with bfloat16 moments differs from that with float32's by more than their rounding, if it does."""
    exact, narrow = (Ours(SMALL.model(backend), moments=moments) for moments in ("float32", "bfloat16"))
    x = SMALL.inputs()
    for _ in range(STEPS):
        losses = [float(trainer.step(x)) for trainer in (exact, narrow)]
    difference = abs(losses[1] / losses[0] - 1)
    return f"loss of step {STEPS} differs by {difference:.1%} from float32's" if difference > 0.01 else None


def _moments_case(shape: Shape, names: Sequence[str]) -> Case:
    x = shape.inputs()
    wrong, contenders, ours = {}, {}, []
    for name in names:
        narrow = f"{name}, bfloat16 moments"
        if complaint := same_losses(name):
            wrong[narrow] = complaint
            continue
        for label, moments in ((narrow, "bfloat16"), (f"{name}, float32 moments", "float32")):
            contenders[label] = partial(Ours(shape.model(name), moments=moments).step, x)
        ours.append(narrow)
    *phases, update = step_phases(shape)
    # of 2 matrices 2 moments each, read and written, half
    update = Cost(update.flops, update.bytes - 2 * 2 * 2 * shape.L * shape.D * FLOAT / 2)
    return Case("moments", shape, contenders, tuple(ours), (*phases, update), wrong=wrong)


OPTIONS = {
    **{
        op: Whole(op, (WIDE, SMALL), (), partial(_replay_case, skewed=skewed))
        for op, skewed in (("replay", False), ("replay-skewed", True))
    },
    "moments": Whole("moments", (*STEP, SMALL), (), _moments_case),
}
