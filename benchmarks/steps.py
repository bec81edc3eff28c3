"""The whole training step against Dense, Lean and Tuned; forward and backward of one stream against EagerSAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparc_fast import SPARC, SparcAdam
from sparc_fast.planning.roofline import Cost

from .cases import FLOAT, SINGLE, SMALL, SMALL_SINGLE, STEP, Case, Shape
from .operators import disagreement
from .rivals import Dense, EagerSAE, Lean, Tuned

RIVALS = ("Dense", "Lean", "Tuned")


class Trainer(Protocol):
    """What the contenders of a step have in common; all start from the same weights."""

    def step(self, x: Tensor) -> Tensor: ...

    def weights(self) -> tuple[Tensor, Tensor]: ...


class Ours:
    def __init__(
        self,
        model: SPARC,
        lazy: Literal["replay"] | None = None,
        moments: Literal["float32", "bfloat16"] = "float32",
        parts: int = 1,
    ) -> None:
        self.model, self.optimizer, self.parts = model, SparcAdam(model, lazy=lazy, moments=moments), parts

    def step(self, x: Tensor) -> Tensor:
        return self.optimizer.step(x.tensor_split(self.parts)).total

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.model.W_enc.data, self.model.W_dec.data


def trainer(name: str, shape: Shape, auxk: bool = True) -> Trainer:
    """A rival, or ours on the backend of that name, perhaps ", lazy" or in ", 8 parts".

    No latent is dead here: only Dense then still computes AuxK.
    """
    if name == "Dense":
        return Dense(shape.model(), auxk_coef=1 / 32 if auxk else 0.0)
    if name in ("Lean", "Tuned"):
        return {"Lean": Lean, "Tuned": Tuned}[name](shape.model())
    name, _, how = name.partition(", ")
    parts, split, _ = how.partition(" parts")
    return Ours(shape.model(name), lazy="replay" if how and not split else None, parts=int(parts) if split else 1)


def check_step(name: str) -> str | None:
    """How a first step without AuxK differs from the reference's in loss and in the move of the weights, if it does."""
    start = [W.detach().clone() for W in (SMALL.model().W_enc, SMALL.model().W_dec)]

    def first_step(name: str) -> tuple[Tensor, Tensor]:
        contender = trainer(name, SMALL, auxk=False)
        loss = contender.step(SMALL.inputs())
        return loss, torch.stack([W - W0 for W, W0 in zip(contender.weights(), start, strict=True)])

    (loss, move), (want_loss, want_move) = first_step(name), first_step("reference")
    # of the norm, not of each entry: Adam's first step keeps only a gradient's sign, and a sum near 0 has either
    difference = float((move - want_move).norm() / want_move.norm())
    return disagreement(loss, want_loss) or (None if difference < 1e-2 else f"first update differs by {difference:.2g}")


def _step_case(shape: Shape, names: Sequence[str]) -> Case:
    x = shape.inputs()
    rivals = {name: check_step(name) for name in (*names, *RIVALS)}
    contenders: dict[str, Callable[[], Tensor]] = {
        name: partial(trainer(name, shape).step, x) for name, wrong in rivals.items() if not wrong
    }
    W = shape.model().W_enc.data
    contenders["x @ W_enc.T"] = lambda: x @ W.T
    wrong = {name: complaint for name, complaint in rivals.items() if complaint}
    return Case("step", shape, contenders, tuple(names), step_phases(shape), frozenset({"x @ W_enc.T"}), wrong)


def step_phases(shape: Shape) -> tuple[Cost, ...]:
    """The encoder's product; values, decode and its gradient; the update: weights and moments, read and written."""
    N, L, D, S, k = shape.N, shape.L, shape.D, shape.S, shape.k
    weights, x = FLOAT * L * D, FLOAT * N * D
    gather_flops = 2 * N * k * D
    return (
        Cost(2 * N * L * D, weights + x),
        Cost(gather_flops * (1 + 2 * S), min(N * k, L) / L * 2 * weights + x * (1 + S)),
        Cost(gather_flops * (1 + S), 12 * weights + x * (1 + S)),
    )


def _sae_case(shape: Shape, names: Sequence[str]) -> Case:
    x = shape.inputs()
    want = _forward_backward(shape.model("reference"), x)
    rivals: dict[str, Callable[[], object]] = {name: partial(_forward_backward, shape.model(name), x) for name in names}
    rivals["EagerSAE"] = partial(_forward_backward, EagerSAE(shape.model()), x)
    wrong = {name: complaint for name, run in rivals.items() if (complaint := disagreement(run(), want))}
    contenders = {name: run for name, run in rivals.items() if name not in wrong}
    N, L, D, k = shape.N, shape.L, shape.D, shape.k
    phases = (
        Cost(2 * N * L * D, FLOAT * (L * D + N * D)),
        Cost(10 * N * k * D, FLOAT * (min(N * k, L) * D + 3 * N * D + 2 * L * D)),
    )
    return Case("sae", shape, contenders, tuple(names), phases, wrong=wrong)


def _forward_backward(model: SPARC | EagerSAE, x: Tensor) -> tuple[Tensor | None, ...]:
    """The loss and the gradients of both weight matrices."""
    model.zero_grad()
    loss = model.loss(x)
    total = loss if isinstance(loss, Tensor) else loss.total
    total.backward()
    return total.detach(), model.W_enc.grad, model.W_dec.grad


@dataclass(frozen=True)
class Whole:
    name: str
    shapes: tuple[Shape, ...]
    rivals: tuple[str, ...]
    case: Callable[[Shape, Sequence[str]], Case]


WHOLE = {
    "step": Whole("step", (*STEP, SMALL), RIVALS, _step_case),
    "sae": Whole("sae", (SINGLE, SMALL_SINGLE), ("EagerSAE",), _sae_case),
}
