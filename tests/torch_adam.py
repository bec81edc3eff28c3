"""Small models of every kind, and what `SparcAdam` is held against on them: torch.optim.Adam on `model.loss`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.selection import RULES

WIDTHS = {"a": 12, "b": 7, "c": 5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "private": {"private": {"a": 9, "c": 6}, "private_k": {"a": 3, "c": 2}},
    "matryoshka": {"matryoshka": (8, 24)},
    "fvu": {"loss": "fvu"},
}
EVERY_RULE = pytest.mark.parametrize("selection", RULES)
EVERY_MOMENTS = pytest.mark.parametrize("moments", ["float32", "bfloat16"])


def make(
    backend: str = "auto", selection: str = "global", dtype: torch.dtype = torch.float32, **options: Any
) -> sf.SPARC:
    """Latents that do not fire are soon dead."""
    torch.manual_seed(0)
    settings = {"n_latents": 48, "k": 5, "auxk": 4, "dead_after": 40, **options}
    return sf.SPARC(WIDTHS, selection=selection, backend=backend, dtype=dtype, **settings)


def batches(steps: int, dtype: torch.dtype = torch.float32, N: int = 16, seed: int = 1) -> list[Tensor]:
    generator = seeded(seed)
    mixing = torch.randn(6, 24, generator=seeded(1), dtype=torch.float64)
    return [(torch.randn(N, 6, generator=generator, dtype=torch.float64) @ mixing).to(dtype) for _ in range(steps)]


def streams_of(x: Tensor, without: str = "") -> dict[str, Tensor]:
    parts = zip(WIDTHS, x.split(list(WIDTHS.values()), dim=1), strict=True)
    return {name: part for name, part in parts if name != without}


def some_present(n: int, seed: int) -> Tensor:
    """bool [n, 3]: each sample has one stream at least."""
    generator = seeded(seed)
    present = torch.rand(n, 3, generator=generator) < 0.6
    present[torch.arange(n), torch.randint(3, (n,), generator=generator)] = True
    return present


def given(way: str, x: Tensor, step: int) -> tuple[Any, Tensor | None]:
    """(samples, and who has which streams), by what they lack: nothing, "samples" their streams, or "streams" one."""
    if way == "lacking streams" and step:
        return streams_of(x, "abc"[step % 3]), None
    if way != "lacking samples":
        return x, None
    present = some_present(len(x), step)
    parts = streams_of(x).items()
    return {name: part.where(present[:, s, None], torch.nan) for s, (name, part) in enumerate(parts)}, present


def parts_of(model: sf.SPARC, freeze: str | Sequence[str]) -> Iterator[tuple[str, Tensor, bool]]:
    """(a parameter's name, the part of it that is one stream's, whether that is trained)"""
    names = {freeze} if isinstance(freeze, str) else {*freeze}
    for name, parameter in model.named_parameters():
        of = {"W_dec": {"decoder"}, "pre_bias": {"encoder", "decoder"}}.get(name, {"encoder"})
        for s, (stream, columns) in enumerate(zip(model.streams, model._columns(), strict=True)):
            place = (s,) if name.startswith("latent_") else (..., columns)
            yield name, parameter[place], not names & {stream, *of}
            if parameter.grad is not None and names & {stream, *of}:
                parameter.grad[place] = 0


class TorchAdam:
    """torch.optim.Adam, with projection before its step and unit norm after it; what is frozen has no gradient."""

    def __init__(
        self,
        model: sf.SPARC,
        lr: float = 1e-2,
        *,
        freeze: str | Sequence[str] = (),
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        self.model, self.freeze, self.max_grad_norm = model, freeze, max_grad_norm
        self.adam = torch.optim.Adam(model.parameters(), lr=lr, **options)
        self.norms: list[float] = []

    def step(self, inputs: Any, *arguments: Any, **options: Any) -> sf.SparcLoss:
        self.adam.zero_grad()
        loss = self.model.loss(inputs, *arguments, **options)
        loss.total.backward()
        with torch.no_grad():
            kept = [(part, part.clone()) for _, part, trained in parts_of(self.model, self.freeze) if not trained]
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.norms.append(float(norm))
        self.model.project_gradients_()
        self.adam.step()
        self.model.normalize_decoder_()
        with torch.no_grad():
            for part, before in kept:
                part.copy_(before)
        return loss._replace(total=loss.total.detach())


def train(given: Iterable[Any], *optimizers: sf.SparcAdam | TorchAdam) -> list[list[sf.SparcLoss]]:
    """The losses of each."""
    return [[optimizer.step(x) for x in given] for optimizer in optimizers]


def assert_close(ours: sf.SPARC, theirs: sf.SPARC, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Weights, counters and thresholds, but not how often these were learned: parts of a batch are several times."""
    found = ours.state_dict()
    for name, expected in theirs.state_dict().items():
        if name == "threshold_count":
            continue
        torch.testing.assert_close(found[name], expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(ours: sf.SparcAdam, theirs: sf.SparcAdam, rtol: float = 0, atol: float = 0) -> None:
    """Weights, counters, thresholds and the optimizer's state, bit for bit or to rounding."""
    found, expected = (
        {**optimizer.model.state_dict(), **{f"state of {i}": s for i, s in optimizer.state_dict()["state"].items()}}
        for optimizer in (ours, theirs)
    )
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
