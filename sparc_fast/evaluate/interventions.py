"""Interventions: take a latent out of one stream's code, or set it, and see what another stream makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents

from .codes import StreamCode, check_code, check_codes, parts

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["Ablations", "Intervention", "dictionary_of", "intervene", "probe_effects"]


class Ablations:
    """What taking each latent out of one stream's code does to the reconstruction of another, for all latents at once.

    As decoding is linear, x_hat without latent l is x_hat - z[l] d[l], and with the residual r = x - x_hat

        |x - x_hat + z[l] d[l]|^2 - |r|^2 = 2 z[l] r . d[l] + z[l]^2 |d[l]|^2,

    so that L ablations of N samples cost N k D, not N L D. Samples come a batch at a time.
    """

    def __init__(self, dictionary: Tensor) -> None:
        """dictionary [L, D]: what a unit of each latent adds to the reconstruction, see `dictionary_of`."""
        if dictionary.dim() != 2:
            raise ValueError(f"dictionary must be [L, D], got {list(dictionary.shape)}")
        self.dictionary = dictionary
        self.n = 0
        self._squares = dictionary.double().square().sum(dim=1)
        self._moved, self._worse = (torch.zeros_like(self._squares) for _ in range(2))
        self._fired = torch.zeros(len(dictionary), dtype=torch.int64, device=dictionary.device)

    @torch.no_grad()
    def add(self, code: StreamCode, residual: Tensor) -> None:
        """code: of n samples, in the source stream. residual [n, D]: the target's inputs - what is decoded from it."""
        L, D = self.dictionary.shape
        check_code(code, L)
        values, indices = code
        if residual.shape != (len(values), D):
            raise ValueError(f"residual must be [N={len(values)}, D={D}], got {list(residual.shape)}")
        for rows in parts(len(values), 16 * values.shape[1] * (D + 8)):
            latents, z = indices[rows].long(), values[rows].double().relu()
            along = torch.einsum("nkd,nd->nk", self.dictionary[latents].double(), residual[rows].double())
            moved = z * z * self._squares[latents]
            self._moved.scatter_add_(0, latents.flatten(), moved.flatten())
            self._worse.scatter_add_(0, latents.flatten(), (2 * z * along + moved).flatten())
            self._fired += torch.bincount(latents[z > 0], minlength=L)
        self.n += len(values)

    @property
    def fired(self) -> Tensor:
        """How many samples fire each latent, [L]: of the others nothing is taken out."""
        return self._fired

    @property
    def moved(self) -> Tensor:
        """Mean squared change of the reconstruction over all samples, float64 [L]."""
        return self._moved / max(self.n, 1)

    @property
    def worse(self) -> Tensor:
        """By how much the mean squared error grows, float64 [L]; below 0 where the target is better off without it."""
        return self._worse / max(self.n, 1)

    @property
    def faithful(self) -> Tensor:
        """worse / moved, [L]: what the target gains by a latent, of what the latent does to it; nan where it is dead.

        1 where the rest of the reconstruction leaves exactly the latent's part to it, 0 where it could be twice or
        nothing, below 0 where it points away from what is missing: then the latent means something else there.
        """
        return torch.where(self._moved > 0, self._worse / self._moved.where(self._moved > 0, 1), torch.nan)

    @property
    def helpful(self) -> float:
        """Of the latents that fire, the fraction without which the target is worse; nan where none does."""
        return float((self._worse > 0)[self._fired > 0].double().mean())


@torch.no_grad()
def dictionary_of(model: SPARC, stream: str) -> Tensor:
    """What a unit of each latent adds to a stream as `model.decode` gives it, [L, D], on the model's device."""
    L, device, dtype = model.n_latents, model.W_dec.device, model.W_dec.dtype
    latents = torch.arange(L, dtype=torch.int32, device=device)[:, None]
    added, nothing = (
        SparseLatents(fill(L, 1, 1, dtype=dtype, device=device), latents, (stream,), L)
        for fill in (torch.ones, torch.zeros)
    )
    return model.decode(added, stream, stream) - model.decode(nothing[:1], stream, stream)


@dataclass(frozen=True, eq=False)
class Intervention:
    """Of each of N samples, float64: before and after a latent was set in the source stream.

    moved [N]: the squared change of the target's reconstruction. error_before, error_after [N]: its squared error,
    None where the target's inputs were not given. logits_before, logits_after [N, C]: a probe's, None without one.
    """

    moved: Tensor
    error_before: Tensor | None
    error_after: Tensor | None
    logits_before: Tensor | None
    logits_after: Tensor | None


@torch.no_grad()
def intervene(
    model: SPARC,
    codes: SparseLatents,
    latent: int,
    value: float,
    source: str,
    target: str,
    *,
    truth: Tensor | None = None,
    probe: Callable[[Tensor], Tensor] | None = None,
) -> Intervention:
    """Set a latent to a value in the code of the source stream, 0 to take it out, and decode the target stream.

    codes: of N samples. truth [N, D]: the target's inputs in the units of `model.decode`. probe: takes reconstructions
    [n, D] and gives logits [n, C], such as `Probe.classify` of one fitted on the target's inputs.
    """
    N, D = len(codes), model.d_streams[target]
    if len(codes.shape) != 1:
        raise ValueError(f"codes must be of N samples, got {list(codes.shape)}")
    if truth is not None and truth.shape != (N, D):
        raise ValueError(f"truth must be [N={N}, D={D}], got {list(truth.shape)}")
    moved: list[Tensor] = []
    errors: tuple[list[Tensor], list[Tensor]] = [], []
    logits: tuple[list[Tensor], list[Tensor]] = [], []
    for rows in parts(N, 64 * D) if N else [slice(0, 0)]:
        some = codes[rows]
        both = [model.decode(c, source, target).double() for c in (some, some.set(latent, value, source))]
        moved.append((both[1] - both[0]).square().sum(dim=1))
        for when, x_hat in enumerate(both):
            if truth is not None:
                errors[when].append((truth[rows].double() - x_hat).square().sum(dim=1))
            if probe is not None:
                logits[when].append(probe(x_hat.float()).double())
    before, after = (torch.cat(found) if found else None for found in errors)
    told_before, told_after = (torch.cat(found) if found else None for found in logits)
    return Intervention(torch.cat(moved), before, after, told_before, told_after)


def probe_effects(code: StreamCode, dictionary: Tensor, weight: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
    """What taking each latent out does to a linear probe on the target: mean fall of logits over samples that fire it.

    (that of the latent's own concept, that of all other concepts on average), float64 [L] each; nan for a dead latent
    or one without a concept. dictionary [L, D] of the target, weight [D, C] of `linear_probe` on it, and concepts [L]
    the column each latent stands for in the source, -1 for none, such as `class_purity`'s. Exact, as all is linear.
    """
    L, C = len(dictionary), weight.shape[1]
    check_codes({"code": code}, L)
    if concepts.shape != (L,) or weight.shape[0] != dictionary.shape[1]:
        raise ValueError(
            f"weight and concepts must be [D={dictionary.shape[1]}, C] and [L={L}], "
            f"got {list(weight.shape)} and {list(concepts.shape)}"
        )
    total, fired = (torch.zeros(L, dtype=torch.float64, device=dictionary.device) for _ in range(2))
    for rows in parts(len(code[0]), 40 * code[0].shape[1]):
        latents, z = code[1][rows].long().flatten(), code[0][rows].double().relu().flatten()
        total.scatter_add_(0, latents, z)
        fired.scatter_add_(0, latents, (z > 0).double())
    known = (concepts >= 0) & (fired > 0)
    mean = torch.where(known, total / fired.clamp_min(1), torch.nan)
    own, others = (torch.full((L,), torch.nan, dtype=torch.float64, device=dictionary.device) for _ in range(2))
    for rows in parts(L, 16 * (C + dictionary.shape[1])):
        effects = dictionary[rows].double() @ weight.double()
        if C:
            own[rows] = effects.gather(1, concepts[rows].clamp_min(0)[:, None])[:, 0]
            others[rows] = (effects.sum(dim=1) - own[rows]) / (C - 1) if C > 1 else torch.nan
    return mean * own, mean * others
