"""A training loop for samples that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sparc_fast.model import SPARC
from sparc_fast.optim.sparc_adam import MomentType, SparcAdam
from sparc_fast.selection import LOCAL

Curves = dict[str, list[float]]


def train(
    model: SPARC,
    inputs: Mapping[str, Tensor],
    *,
    steps: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    warmup: float = 0.05,
    cross_loss_coef: float = 1.0,
    auxk_coef: float = 1 / 32,
    support_dropout: float = 0.0,
    moments: MomentType = "float32",
    seed: int = 0,
    curve_points: int = 200,
    on_step: Callable[[int], object] | None = None,
) -> Curves:
    """Train with `SparcAdam`: shuffled epochs, one after the other, linear warm-up, cosine decay to 0.

    Args:
        inputs: every stream's samples, [N, D_s], in memory.
        steps: optimizer steps.
        warmup: the part of the steps in which the learning rate rises to `lr`.
        support_dropout: the probability with which a stream has no say in the support of a batch; one stream always
            has. Under local selection it must be 0.
        moments: the type Adam keeps them in, as in `SparcAdam`.
        seed: of the shuffling, the dropout and the rounding of bfloat16 moments; the same seed gives the same model,
            bit for bit, on one machine.
        curve_points: about how many points of the training curves to keep.
        on_step: called with the number of steps done, after each.

    Returns:
        curves: "step", "loss", "self", "cross" (when it is trained on) and "dead", lists of equal length.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be >= 1, got {steps} and {batch_size}")
    if not 0 <= support_dropout < 1:
        raise ValueError(f"support_dropout must be in [0, 1), got {support_dropout}")
    if support_dropout and model.selection in LOCAL:
        raise ValueError("support_dropout must be 0 under local selection: each stream chooses its own support")
    if not 0 <= warmup <= 1 or curve_points < 1:
        raise ValueError(f"warmup must be in [0, 1] and curve_points >= 1, got {warmup} and {curve_points}")
    given = tuple(name for name in model.streams if name in inputs)
    n_samples = min((len(inputs[name]) for name in given), default=0)
    if given != model.streams or n_samples == 0:
        raise ValueError(f"inputs must hold samples of every stream {model.streams}, got {n_samples} of {given}")
    optimizer = SparcAdam(model, lr=lr, moments=moments, seed=seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps, warmup))
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(n_samples, batch_size, generator)
    curves: Curves = {"step": [], "loss": [], "self": [], "cross": [], "dead": []}
    every = max(1, steps // curve_points)
    model.train()
    for step in range(1, steps + 1):
        rows = next(batches)
        batch = {name: stream[rows] for name, stream in inputs.items()}
        choosing = _choosing_streams(model.streams, support_dropout, generator) if support_dropout else None
        loss = optimizer.step(batch, cross_loss_coef, auxk_coef, choosing)
        schedule.step()
        if step % every == 0 or step == steps:
            curves["step"].append(step)
            curves["loss"].append(float(loss.total))
            curves["self"].append(float(loss.self))
            curves["cross"].append(math.nan if loss.cross is None else float(loss.cross))
            curves["dead"].append(int(model.dead.sum()))
        if on_step is not None:
            on_step(step)
    model.eval()
    if math.isnan(curves["cross"][0]):
        del curves["cross"]
    return curves


def _batches(n_samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of batches without end: every epoch is a new permutation, and its ragged tail opens the next."""
    rows = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(n_samples, generator=generator, device="cpu")])
        yield rows[:batch_size]
        rows = rows[batch_size:]


def _choosing_streams(streams: tuple[str, ...], dropout: float, generator: torch.Generator) -> tuple[str, ...]:
    """Each stream with probability 1 - dropout, drawn again until there is one."""
    while True:
        keep = torch.rand(len(streams), generator=generator, dtype=torch.float32, device="cpu") >= dropout
        if keep.any():
            return tuple(name for name, kept in zip(streams, keep, strict=True) if kept)


def _schedule(step: int, steps: int, warmup: float) -> float:
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))
