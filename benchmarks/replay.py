"""SparcAdam(lazy="replay") against SparcAdam: the same training, in less memory traffic where latents are many."""

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
from .cases import FLOAT, SMALL, WIDE, Case, Shape
from .steps import Whole

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


def case(shape: Shape, names: Sequence[str], skewed: bool) -> Case:
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


REPLAY = {
    op: Whole(op, (WIDE, SMALL), (), partial(case, skewed=skewed))
    for op, skewed in (("replay", False), ("replay-skewed", True))
}
