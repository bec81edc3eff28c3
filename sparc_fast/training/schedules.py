"""What changes during training: functions of the number of steps made, so that there is no state to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparc_fast.sizes import counted

from .config import Config

DROPOUT = 1_397_769_556  # keeps these draws apart from the loader's, which have the same seed
FEW, ENOUGH = 300, 1000  # steps, of which epochs that make few are told and a proposal makes about enough
SMALLEST_BATCH, LR_OF_SHORT_RUNS = 64, 4e-3


def advice_on_few_steps(config: Config, rows: int) -> str | None:
    """What is proposed where `epochs` of `rows`, at least a batch, make few steps; None where `steps` are given."""
    batch, epochs = config.batch_size, config.epochs
    steps = max(1, round(epochs * (rows // batch)))
    if config.steps or steps >= FEW:
        return None
    while batch > SMALLEST_BATCH and epochs * (rows // batch) < ENOUGH:
        batch = max(SMALLEST_BATCH, 1 << (batch - 1).bit_length() - 1)  # the next smaller power of two
    if epochs * (rows // batch) < FEW:
        epochs = math.ceil(ENOUGH / (rows // batch))
    proposed = {"batch_size": batch, "epochs": epochs, "lr": max(config.lr, LR_OF_SHORT_RUNS)}
    changes = [f"{name} = {value:g}" for name, value in proposed.items() if value != getattr(config, name)]
    return (
        f"a run of {counted(steps, 'step')} is short: {counted(rows, 'row')} in batches of {config.batch_size:,}, "
        f"{counted(config.epochs, 'epoch')}. "
        f"{' and '.join(changes)} would make {round(epochs * (rows // batch)):,} of them; nothing is changed for you"
    )


@dataclass(frozen=True)
class Schedule:
    """The settings of the step that follows `step` others, of `steps` in all."""

    config: Config
    steps: int

    def lr(self, step: int) -> float:
        """Linear warm-up, then the decay chosen, which ends at ``lr_end * lr`` after the last step."""
        c = self.config
        rising = c.warmup * self.steps
        if step < rising:
            return c.lr * (step + 1) / (rising + 1)
        done = (step - rising) / max(1.0, self.steps - rising)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[c.decay]
        return c.lr * (c.lr_end + (1 - c.lr_end) * left)

    def cross_loss_coef(self, step: int) -> float:
        c = self.config
        return self._ramp(step, c.cross_loss_start, c.cross_loss_coef, c.cross_loss_ramp)

    def k(self, step: int) -> int:
        c = self.config
        return round(self._ramp(step, c.k_start, c.k, c.k_ramp))

    def support_from(self, step: int, streams: tuple[str, ...]) -> tuple[str, ...] | None:
        """The streams that choose the support: each with probability 1 - support_dropout, drawn until there is one."""
        dropout = self.config.support_dropout
        if dropout == 0:
            return None
        for draw in range(2**31):
            # of NumPy's generators only PCG64's raw numbers are promised to stay what they are
            raw = np.random.PCG64((self.config.seed, DROPOUT, step, draw)).random_raw(len(streams))
            kept = tuple(name for name, number in zip(streams, raw.tolist(), strict=True) if number >= dropout * 2**64)
            if kept:
                return kept
        raise AssertionError("some stream is kept")

    def _ramp(self, step: int, start: float, end: float, part: float) -> float:
        over = part * self.steps
        return end if step >= over else start + (end - start) * step / over
